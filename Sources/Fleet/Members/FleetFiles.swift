internal import Glibc
internal import IO
internal import TLS

/// Where a host keeps what it has of its fleet. This type alone knows the names.
public struct FleetFiles: Sendable, Hashable {
    /// The list as an `authz-list-file`, which a destination agent uses when nothing else is said.
    public static let peers = "/etc/crossdock/peers.json"

    /// What is put before every path: empty, but in tests.
    public let root: String

    /// The authority, on the one host that has its key.
    public let authority: String

    /// Names the files of this host.
    ///
    /// - Parameters:
    ///   - root: what is put before every path.
    ///   - authority: the directory of the authority; the usual one when nil.
    public init(root: String = "", authority: String? = nil) {
        self.root = root
        self.authority = authority ?? "\(root)\(Self.usualAuthority)"
    }

    private static let usualAuthority = "/etc/pki/crossdock-ca"

    /// Lets an authority in another place be found where it usually is: renewals are not told where it is. Another one there stays.
    ///
    /// - Throws: `FileError` when that cannot be written down.
    func rememberAuthority() throws {
        let usual = "\(root)\(Self.usualAuthority)"
        var status = stat()
        guard authority != usual, lstat(usual, &status) != 0 else { return }
        try DurableFile.makeDirectory("\(root)/etc/pki")
        guard symlink(authority, usual) == 0 else {
            throw FileError("\(usual) cannot become a link to \(authority): \(String(cString: strerror(errno)))")
        }
        try DurableFile.syncDirectory(of: usual)
    }

    /// Takes back what `rememberAuthority()` has done; the authority itself stays.
    func forgetAuthority() {
        let usual = "\(root)\(Self.usualAuthority)"
        var status = stat()
        guard lstat(usual, &status) == 0, status.st_mode & S_IFMT == S_IFLNK else { return }
        unlink(usual)
    }

    /// The host's certificates.
    public var credentials: String { "\(root)/etc/pki/crossdock" }
    /// Certificates and keys that are being made.
    var newCredentials: String { "\(root)/etc/pki/crossdock.new" }
    /// What was there before.
    var oldCredentials: String { "\(root)/etc/pki/crossdock.before-pairing" }
    /// The signed list.
    public var list: String { "\(root)/etc/crossdock/fleet.json" }
    /// The list as an `authz-list-file`.
    public var authorization: String { root + Self.peers }

    /// Whether this host has the authority's key.
    public var hasAuthority: Bool { DurableFile.exists("\(authority)/ca-key.pem") }

    /// The authority's certificate as this host trusts it, PEM; nil when it trusts none.
    public func trustedAuthority() throws -> [UInt8]? {
        try DurableFile.read("\(credentials)/ca-cert.pem", limit: 1 << 20)
    }

    /// The signed list; nil when there is none.
    ///
    /// - Throws: `FileError`, or `FleetError` for a file that is none.
    public func signedList() throws -> SignedFleetList? {
        guard let bytes = try DurableFile.read(list, limit: 4 << 20) else { return nil }
        guard let signed = JSONText.decode(SignedFleetList.self, from: bytes) else {
            throw FleetError("\(list) is damaged; 'crossdock pair' on the authority's host writes it anew")
        }
        return signed
    }

    /// Takes a list over, durably; an earlier one than what is there is refused, the same again is none.
    ///
    /// - Returns: its number.
    /// - Throws: `FleetError` when it is not signed by this host's authority, or an earlier one.
    @discardableResult
    public func accept(_ signed: SignedFleetList) throws -> UInt64 {
        guard let authority = try trustedAuthority() else {
            throw FleetError("\(credentials) has no ca-cert.pem: this host belongs to no fleet")
        }
        let next = try signed.verified(by: authority)
        // A list that is not of this authority is of an earlier fleet, and has no say.
        if let current = try signedList(), let known = try? current.verified(by: authority) {
            guard next.number >= known.number else {
                throw FleetError(
                    "The list \(next.number) of the fleet is older than list \(known.number), which this host has"
                )
            }
            guard next.number > known.number || next == known else {
                throw FleetError("There are two lists \(next.number) of the fleet, which differ")
            }
        }
        try DurableFile.makeDirectory("\(root)/etc/crossdock")
        // Who may send is said first: nobody is left in who is out.
        try DurableFile.write(try next.authorization, to: authorization, mode: 0o644)
        try DurableFile.write(try JSONText.encode(signed), to: list, mode: 0o644)
        return next.number
    }
}
