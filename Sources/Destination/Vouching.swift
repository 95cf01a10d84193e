internal import Emulator
internal import Migration

/// Why an operator knows that a guest's other host will never run it. Its silence proves nothing: guests outlive agents and links.
public enum Vouching: Sendable, Hashable {
    /// The host is switched off, and stays off until its copy was removed.
    case otherHostIsOff
    /// The host was installed anew, and answers without knowing the guest. The name is that of its identity.
    case otherHostWasErased(String)

    /// Reads the arguments of `take-ownership`.
    init(_ arguments: JSONValue) throws {
        let isOff = arguments["other-host-is-off"] == true
        switch (isOff, arguments["other-host-was-erased"]?.string) {
        case (true, nil): self = .otherHostIsOff
        case (false, let name?): self = .otherHostWasErased(name)
        default:
            throw GuestError(
                "Taking a guest needs your word that its other host will never run it: either --other-host-is-off, or "
                    + "--other-host-was-erased with the name of that host"
            )
        }
    }

    /// For the journal.
    var words: String {
        switch self {
        case .otherHostIsOff: "who says that the other host is off"
        case .otherHostWasErased(let name): "who says that \(name) was erased"
        }
    }

    /// Whether the host that was named is the one that the guest comes from.
    func check(source: String) throws {
        guard case .otherHostWasErased(let name) = self, name != source else { return }
        throw GuestError("The guest comes from '\(source)', as 'crossdock status' shows it, and not from '\(name)'")
    }
}
