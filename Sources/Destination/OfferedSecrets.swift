internal import Emulator
internal import IO
internal import TLS

/// The values of a guest's secrets until its QEMU is started; never on a disk.
struct OfferedSecrets {
    private(set) var values: [String: SecretBytes] = [:]

    /// Takes what a message SECRETS has; a later value of an id counts.
    ///
    /// - Throws: `GuestError` for what is no Base64, and beyond the limits of `PeerLimits`.
    mutating func add(_ encoded: [String: String]) throws {
        var total = values.reduce(0) { $0 + $1.key.utf8.count + $1.value.count }
        for (id, text) in encoded {
            guard var bytes = Base64.decode(text.utf8) else { throw GuestError("A secret of the offer is not Base64") }
            if let earlier = values[id] { total -= id.utf8.count + earlier.count }
            total += id.utf8.count + bytes.count
            guard values[id] != nil || values.count < PeerLimits.secrets, total <= PeerLimits.secretBytes else {
                throw GuestError(
                    "The limit of \(PeerLimits.secrets) secrets of \(PeerLimits.secretBytes >> 10) KiB together is reached"
                )
            }
            values[id] = try SecretBytes(wiping: &bytes)
        }
    }
}
