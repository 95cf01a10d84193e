/// The names of metadata contexts that are known to more than one implementation.
public enum MetaContext {
    /// Holes and zeroes.
    public static let allocation = "base:allocation"
    /// How far down in a chain of images the data is: QEMU's context.
    public static let allocationDepth = "qemu:allocation-depth"
    /// What QEMU's dirty bitmaps are called, with the name of the bitmap after it.
    public static let dirtyBitmapPrefix = "qemu:dirty-bitmap:"

    /// Whether a query of a client means this context.
    ///
    /// - Parameters:
    ///   - query: an exact name; when listing also the beginning of names, up to a colon.
    ///   - name: the context's name.
    ///   - listing: whether the client only asks what there is.
    static func query(_ query: String, matches name: String, listing: Bool) -> Bool {
        query == name || listing && query.hasSuffix(":") && name.hasPrefix(query)
    }
}
