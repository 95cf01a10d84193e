public import TLS

/// What a client wants of a server.
public struct NBDClientOptions: Sendable {
    /// The export's name; empty for the server's default export.
    public var export: String
    /// With credentials TLS is required: the client never goes on in clear text.
    public var credentials: (any TLSCredentials)?
    /// The name that the server's certificate must be for.
    public var hostname: String?
    /// Who the server must prove to be besides; nil for anybody whom the credentials trust.
    public var identity: String?
    /// The metadata contexts to ask for; what the server does not know is left out.
    public var contexts: [String]
    /// The best form of headers to ask for; a server that knows less gets less.
    public var form: HeaderForm
    /// The time allowed for the negotiation.
    public var timeout: Duration
    /// How long a server may say nothing while requests wait for their replies; for ever when it is nil.
    public var replyTimeout: Duration?

    /// Says what an error of the server means, to whom it is passed on; the error as it came when it is nil.
    public var explain: (@Sendable (NBDError) -> NBDError)?

    /// Makes options.
    public init(
        export: String,
        credentials: (any TLSCredentials)? = nil,
        hostname: String? = nil,
        contexts: [String] = [],
        form: HeaderForm = .extended,
        timeout: Duration = .seconds(10),
        replyTimeout: Duration? = nil
    ) {
        self.export = export
        self.credentials = credentials
        self.hostname = hostname
        self.contexts = contexts
        self.form = form
        self.timeout = timeout
        self.replyTimeout = replyTimeout
    }
}
