internal import CLinux
internal import Glibc

/// A ruleset of the kernel's Landlock, made from a confinement in the process that starts the program.
struct LandlockRuleset: ~Copyable {
    /// The ruleset; -1 where the kernel has no Landlock.
    let descriptor: Int32

    /// The kernel's version of Landlock; nil where it has none, or it is switched off.
    static let version: Int? = {
        let version = xd_landlock_version()
        return version > 0 ? Int(version) : nil
    }()

    /// All rights that a version knows. What a ruleset handles and no rule allows is denied.
    static func handled(by version: Int) -> UInt64 {
        switch version {
        case 1: (1 << 13) - 1
        case 2: (1 << 14) - 1
        case 3, 4: (1 << 15) - 1
        default: (1 << 16) - 1
        }
    }

    private static let listening: UInt64 = 1 << 0
    private static let connecting: UInt64 = 1 << 1
    /// Abstract Unix sockets and signals of others.
    private static let scopes: UInt64 = 3

    /// Makes the ruleset.
    ///
    /// - Throws: `GuestError` that names the file or the port that could not be allowed.
    init(_ confinement: Confinement) throws { descriptor = try Self.make(confinement) }

    private static func make(_ confinement: Confinement) throws -> Int32 {
        guard let version else { return -1 }
        let ports = version < 4 ? 0 : listening | (confinement.isWithoutNetwork ? connecting : 0)
        let ruleset = xd_landlock_ruleset(handled(by: version), ports, version < 6 ? 0 : scopes)
        guard ruleset >= 0 else {
            throw GuestError("Cannot make a ruleset of Landlock: \(String(cString: strerror(errno)))")
        }
        do {
            for rule in confinement.rules { try allow(rule, handled(by: version), in: ruleset) }
            for port in version < 4 ? [] : confinement.ports
            where xd_landlock_allow_port(ruleset, port, listening) != 0 {
                throw GuestError("Cannot allow the port \(port): \(String(cString: strerror(errno)))")
            }
        } catch {
            close(ruleset)
            throw error
        }
        return ruleset
    }

    deinit { if descriptor >= 0 { close(descriptor) } }

    private static let ofFiles: Confinement.Rights = [.execute, .write, .read, .truncate, .control]

    private static func allow(_ rule: Confinement.Rule, _ handled: UInt64, in ruleset: Int32) throws {
        func failure(_ number: Int32) -> GuestError {
            GuestError("Cannot allow a confined program the use of \(rule.path): \(String(cString: strerror(number)))")
        }
        let name = xd_open_name(rule.path)
        guard name >= 0 else {
            if rule.isOptional { return }
            throw failure(errno)
        }
        defer { close(name) }
        var status = stat()
        guard fstat(name, &status) == 0 else { throw failure(errno) }
        let isDirectory = status.st_mode & S_IFMT == S_IFDIR
        let rights = handled & (isDirectory ? rule.rights : rule.rights.intersection(ofFiles)).rawValue
        guard rights != 0 else { return }
        guard xd_landlock_allow(ruleset, name, rights) == 0 else { throw failure(errno) }
    }
}
