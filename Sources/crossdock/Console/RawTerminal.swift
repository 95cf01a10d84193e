import Glibc

/// The terminal of this program, as long as each key goes to a guest as it is. It is what it was before once the value is restored.
final class RawTerminal {
    private let descriptor: Int32
    private var before: termios
    private var isRaw = true

    /// Takes the terminal of standard input over; nil when that is none.
    init?() {
        guard isatty(0) == 1 else { return nil }
        // Standard input itself is given to a channel.
        let copy = fcntl(0, F_DUPFD_CLOEXEC, 3)
        var before = termios()
        guard copy >= 0, tcgetattr(copy, &before) == 0 else { return nil }
        var raw = before
        cfmakeraw(&raw)
        guard tcsetattr(copy, TCSADRAIN, &raw) == 0 else {
            close(copy)
            return nil
        }
        (descriptor, self.before) = (copy, before)
    }

    /// Gives it back as it was.
    func restore() {
        guard isRaw else { return }
        isRaw = false
        // A guest may have left colours, another screen or a hidden cursor.
        let calm = Array("\u{1b}[0m\u{1b}[?25h\u{1b}[?1049l\r\n".utf8)
        _ = calm.withUnsafeBytes { write(descriptor, $0.baseAddress, $0.count) }
        tcsetattr(descriptor, TCSAFLUSH, &before)
        close(descriptor)
    }

    deinit { restore() }
}
