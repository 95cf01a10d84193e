/// Something with an id that others refer to: a secret, credentials, an authorisation. QEMU's user-creatable objects.
public protocol SecurityObject: AnyObject, Sendable {
    /// The id.
    var id: String { get }
    /// QEMU's name of the type.
    var type: String { get }
}
