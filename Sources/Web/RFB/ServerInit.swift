internal import IO

/// What a server says of its screen in the end of the handshake (RFC 6143, section 7.3.2).
package struct ServerInit: Sendable, Hashable {
    /// How wide the screen is, in pixels.
    package var width: UInt16
    /// How high it is.
    package var height: UInt16
    /// How pixels are written as long as the viewer says nothing else.
    package var format: PixelFormat
    /// The name of the desktop, at most `mostName` bytes.
    package var name: String

    /// The most bytes of a name that is taken from a server.
    package static let mostName = 1024

    /// As it is sent.
    package var bytes: [UInt8] {
        let name = Array(name.utf8)
        return width.rfb + height.rfb + format.bytes + UInt32(clamping: name.count).rfb + name
    }
}
