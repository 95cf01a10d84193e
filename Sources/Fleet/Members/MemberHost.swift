internal import CLinux
internal import FoundationEssentials
internal import Glibc
internal import IO
internal import Migration
internal import TLS

/// Carries out on this host what a pairing wants of it. Blocks: run it on the pool.
public struct MemberHost: Sendable {
    private let files: FleetFiles
    private let stateDirectory: String
    private let version: String

    /// Names the host.
    ///
    /// - Parameters:
    ///   - files: where it keeps what it has of its fleet.
    ///   - stateDirectory: where its agent is.
    ///   - version: Crossdock's.
    public init(files: FleetFiles, stateDirectory: String, version: String) {
        self.files = files
        self.stateDirectory = stateDirectory
        self.version = version
    }

    /// Carries out an order, but for `prove`, `bring` and `finish`, which need more than files.
    ///
    /// - Throws: `FleetError`, `FileError` or `CredentialError`; nothing is half done then.
    public func carryOut(_ order: MemberOrder) throws -> MemberAnswer {
        var answer = MemberAnswer()
        switch order {
        case .look: answer.look = try look()
        case .request(let name): answer.request = try request(name)
        case .certify(let certificate, let authority): try certify(certificate, authority)
        case .list(let list): try files.accept(list)
        case .serve(let isNew): answer.notes = try serve(isNew)
        case .prove, .bring, .finish: throw FleetError("That needs more than the files of this host")
        case .leave: try leave()
        }
        return answer
    }

    // MARK: look

    private func look() throws -> MemberLook {
        var look = MemberLook(
            version: version,
            name: HostExamination.ownName,
            clock: Int64(Date.now.timeIntervalSince1970 * 1000),
            hasSystemd: DurableFile.exists("/run/systemd/system"),
            free: xd_free_bytes("\(files.root)/etc")
        )
        if let authority = try files.trustedAuthority() {
            look.authority = try CertificateAuthority.fingerprint(of: authority)
        }
        let directory = CredentialDirectory(checking: files.credentials)
        if let own = directory.entries.first(where: { $0.file == "server-cert.pem" }) {
            look.identity = own.subject
            look.names = own.names
            if directory.isGood, directory.endpoints.count == TLSEndpoint.allCases.count { look.ends = own.notAfter }
        }
        if let authority = try files.trustedAuthority(), let signed = try? files.signedList() {
            look.list = try? signed.verified(by: authority).number
        }
        look.isServing = HostExamination.isServing(stateDirectory: stateDirectory)
        return look
    }

    // MARK: certificates

    private func request(_ name: String) throws -> String {
        guard FleetMember.isName(name) else { throw FleetError("'\(name.shown(most: 100))' is no name of a host") }
        // An earlier attempt was cut off between two names.
        if !DurableFile.exists(files.credentials), DurableFile.exists(files.oldCredentials) {
            try move(files.oldCredentials, files.credentials)
        }
        DurableFile.remove(files.newCredentials)
        try DurableFile.makeDirectory(files.newCredentials)
        return try CertificateRequest.make(name: name, keyIn: files.newCredentials)
    }

    private func certify(_ certificate: String, _ authority: String) throws {
        let directory = files.newCredentials
        guard DurableFile.exists("\(directory)/server-key.pem") else {
            throw FleetError("This host has asked for no certificate: \(directory) has no key")
        }
        try DurableFile.write(Array(authority.utf8), to: "\(directory)/ca-cert.pem", mode: 0o644)
        for endpoint in TLSEndpoint.allCases {
            try DurableFile.write(
                Array(certificate.utf8),
                to: "\(directory)/\(endpoint.rawValue)-cert.pem",
                mode: 0o644
            )
        }
        try DurableFile.write([], to: "\(directory)/\(Self.mark)")
        let checked = CredentialDirectory(checking: directory)
        guard checked.isGood else {
            let reasons = checked.findings.filter { $0.severity == .error }.map(\.message)
            DurableFile.remove(directory)
            throw FleetError("The certificate is not good here: \(reasons.joined(separator: "; "))")
        }
        if DurableFile.exists(files.credentials) {
            // What a renewal replaces is no pairing's: leaving brings back what was there before the first.
            let isRenewal = try files.trustedAuthority() == Array(authority.utf8) && isMember
            if isRenewal {
                let replaced = "\(files.oldCredentials).replaced"
                DurableFile.remove(replaced)
                try move(files.credentials, replaced)
                try move(directory, files.credentials)
                return DurableFile.remove(replaced)
            }
            DurableFile.remove(files.oldCredentials)
            try move(files.credentials, files.oldCredentials)
        }
        try move(directory, files.credentials)
    }

    /// Whether the certificates are of a pairing.
    private var isPaired: Bool { DurableFile.exists("\(files.credentials)/\(Self.mark)") }
    private static let mark = ".paired"

    private var isMember: Bool { DurableFile.exists(files.list) }

    private func move(_ from: String, _ to: String) throws {
        guard rename(from, to) == 0 else {
            throw FileError("\(from) cannot become \(to): \(String(cString: strerror(errno)))")
        }
        try DurableFile.syncDirectory(of: to)
    }

    // MARK: the service

    private static let units = ["crossdock-hold", "crossdock-recover", "crossdock-evacuate", "crossdock-destination"]

    private func serve(_ isNew: Bool) throws -> [String] {
        guard DurableFile.exists("/run/systemd/system") else {
            let isServing = HostExamination.isServing(stateDirectory: stateDirectory)
            if isServing, !isNew { return [] }
            return [
                isServing ? "start its agent anew: crossdock destination" : "start its agent: crossdock destination"
            ]
        }
        try systemctl(["enable", "--quiet"] + Self.units)
        // One that runs knows neither new certificates nor a list that it did not find at its start.
        try systemctl([isNew ? "restart" : "start", "crossdock-destination"])
        return []
    }

    private func systemctl(_ words: [String]) throws {
        let run = try ProgramRun.run(["systemctl"] + words)
        guard run.code == 0 else {
            throw FleetError(
                "systemctl \(words.joined(separator: " ")): \(run.words); 'journalctl -u crossdock-destination' says more"
            )
        }
    }

    // MARK: leaving

    private func leave() throws {
        DurableFile.remove(files.newCredentials)
        // What no pairing has put there stays.
        if isPaired { DurableFile.remove(files.credentials) }
        let hadOthers = !DurableFile.exists(files.credentials) && DurableFile.exists(files.oldCredentials)
        if hadOthers { try move(files.oldCredentials, files.credentials) }
        DurableFile.remove(files.list)
        DurableFile.remove(files.authorization)
        guard DurableFile.exists("/run/systemd/system") else { return }
        // Its credentials are gone from the disk, not from its memory.
        try systemctl([hadOthers ? "restart" : "stop", "crossdock-destination"])
    }
}
