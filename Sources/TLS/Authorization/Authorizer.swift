internal import FoundationEssentials
internal import Glibc
internal import IO

/// Decides whether a peer that proved its identity may pass.
public protocol Authorizer: SecurityObject {
    /// Whether a peer with these names may pass. The first name is the main one: a certificate's distinguished name, or the
    /// user of a pre-shared key; the certificate's alternative names follow.
    func allows(_ identities: [String]) -> Bool
}

/// Allows one identity: QEMU's `authz-simple`.
public final class SimpleAuthorizer: Authorizer {
    /// The object's id.
    public let id: String
    /// The type.
    public let type = "authz-simple"
    private let identity: String

    /// Makes an authorisation for one identity, compared byte for byte.
    public init(id: String, identity: String) {
        self.id = id
        self.identity = identity
    }

    /// See `Authorizer.allows(_:)`.
    public func allows(_ identities: [String]) -> Bool {
        AuthorizationRule(match: identity, policy: .allow).matches(any: identities)
    }
}

/// Rules in their order, the first that matches decides, and a policy when none does: QEMU's `authz-list`.
public final class ListAuthorizer: Authorizer {
    /// The object's id.
    public let id: String
    /// The type.
    public let type = "authz-list"
    /// The rules in their order.
    public let rules: [AuthorizationRule]
    /// What is decided when no rule matches.
    public let policy: AuthorizationPolicy

    /// Makes a list.
    public init(id: String, rules: [AuthorizationRule], policy: AuthorizationPolicy = .deny) {
        self.id = id
        self.rules = rules
        self.policy = policy
    }

    /// See `Authorizer.allows(_:)`. A rule that begins with the kind of an alternative name is about those, any other about the
    /// main name.
    public func allows(_ identities: [String]) -> Bool {
        for rule in rules where rule.matches(any: identities) { return rule.policy == .allow }
        return policy == .allow
    }
}

/// A list in a JSON file: QEMU's `authz-list-file`.
///
/// With `refresh` the file is compared with what was read before at each decision, so that a change counts from the moment
/// it is in place. A file that cannot be read or understood denies everybody until it is good again.
public final class ListFileAuthorizer: Authorizer {
    /// The object's id.
    public let id: String
    /// The type.
    public let type = "authz-list-file"
    /// The file.
    public let path: String
    private let refresh: Bool
    private struct State {
        var contents: [UInt8]
        var list: ListAuthorizer?
        var problem: String?
        /// Whether the contents were read, but not understood.
        var isBad = false
    }
    private let state: Guarded<State>

    /// Reads the file.
    ///
    /// - Parameters:
    ///   - id: the object's id.
    ///   - path: an absolute path.
    ///   - refresh: whether later changes count.
    /// - Throws: `CredentialError` when the file cannot be read or understood now.
    public init(id: String, path: String, refresh: Bool = true) throws {
        guard path.hasPrefix("/") else {
            throw CredentialError("Parameter 'filename' of object '\(id)' must be an absolute path, not '\(path)'")
        }
        self.id = id
        self.path = path
        self.refresh = refresh
        let contents = try CredentialFile.contents(path)
        state = Guarded(State(contents: contents, list: try Self.parse(contents, id: id, path: path)))
    }

    /// Why everybody is denied at present; nil when the file is good.
    public var problem: String? { state.withLock { $0.problem } }

    /// See `Authorizer.allows(_:)`.
    public func allows(_ identities: [String]) -> Bool {
        state.withLock { state in
            if refresh {
                do {
                    let contents = try CredentialFile.contents(path)
                    // A file that was bad and is the same is still bad.
                    if contents != state.contents || state.list == nil && !state.isBad {
                        state.list = nil
                        state.contents = contents
                        state.isBad = true
                        state.list = try Self.parse(contents, id: id, path: path)
                        state.isBad = false
                        state.problem = nil
                    }
                } catch {
                    state.list = nil
                    state.problem = "\(error)"
                }
            }
            return state.list?.allows(identities) ?? false
        }
    }

    private static func parse(_ contents: [UInt8], id: String, path: String) throws -> ListAuthorizer {
        let decoded: [String: ObjectValue]
        do {
            decoded = try JSONDecoder().decode([String: ObjectValue].self, from: Data(contents))
        } catch {
            throw CredentialError("Unable to parse \(path) of object '\(id)': it is not a JSON object")
        }
        do {
            var reader = PropertyReader(decoded, isKeyval: false)
            let rules = try AuthorizationRule.parse(reader.records("rules") ?? [])
            let policy: AuthorizationPolicy = try reader.choice("policy") ?? .deny
            try reader.finish()
            return ListAuthorizer(id: id, rules: rules, policy: policy)
        } catch let error as CredentialError {
            throw CredentialError("In \(path) of object '\(id)': \(error.message)")
        }
    }
}
