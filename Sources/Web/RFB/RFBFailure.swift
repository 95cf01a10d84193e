/// Why a conversation in the Remote Framebuffer protocol (RFC 6143) cannot go on.
package enum RFBFailure: Error, Sendable, Hashable, CustomStringConvertible {
    /// The other end does not speak as it should.
    case violation(String)
    /// The other end does not want to, or wants something that there is none of here.
    case refused(String)

    /// What is wrong, half a sentence.
    package var description: String {
        switch self {
        case .violation(let reason), .refused(let reason): reason
        }
    }
}
