import ArgumentParser
import IO
import Source

/// What holds for the move of each guest, by `migrate` and by `evacuate`.
struct MoveOptions: ParsableArguments {
    private static let (pause, longestPause) = (Milliseconds(300), Milliseconds(10_000))
    private static let keeping = TimeSpan.days(7)

    @Option(
        help:
            "Connections for each disk, and for the memory on a long line, at most: more than four only where more carry more."
    )
    var connections: Int = MigrationPlan.usualConnectionsAtMost

    @Option(
        help: ArgumentHelp(
            "Whether memory and disks are compressed on their way: auto (where the line is slower than the processor), off, or always at a level of zstd from 1 to 19.",
            default: "auto",
            valueName: "auto|off|level"
        ),
        transform: MoveOptions.compression
    )
    var compress = Compression.auto

    @Option(
        help: ArgumentHelp("The pause of the guest to aim at.", default: MoveOptions.pause, valueName: "ms"),
        transform: Milliseconds.parse
    )
    var downtimeLimit = MoveOptions.pause

    @Option(
        help: ArgumentHelp(
            "By how much the guest may be slowed down so that its memory gets through, in percent of its time: 0 to 99.",
            valueName: "percent"
        )
    )
    var slowDown = MigrationPlan.mostSlowDown

    @Option(
        help: ArgumentHelp(
            "A pause that is given up: the guest resumes here.",
            default: MoveOptions.longestPause,
            valueName: "ms"
        ),
        transform: Milliseconds.parse
    )
    var blackoutDeadline = MoveOptions.longestPause

    @Option(
        help: ArgumentHelp(
            "How long an outage of the link or of the other host is waited for, while the guest runs here: 90s, 10m.",
            default: TimeSpan.usualPatience,
            valueName: "time"
        ),
        transform: TimeSpan.parse
    )
    var patience = TimeSpan.usualPatience

    @Option(
        help: ArgumentHelp(
            "How long this host keeps the old images: 90s, 12h, 7d.",
            default: MoveOptions.keeping,
            valueName: "time"
        ),
        transform: TimeSpan.parse
    )
    var keepSource = MoveOptions.keeping

    private static func compression(_ text: String) throws -> Compression {
        switch text {
        case "auto": return .auto
        case "off": return .off
        default:
            guard let level = Int(text), ZstdCompressor.levels.contains(level) else {
                throw ValidationError("--compress takes auto, off, or a level from 1 to 19")
            }
            return .level(level)
        }
    }

    /// Checks what a limit of the line may be. Less than the least is a unit that was forgotten.
    static func check(bandwidth: ByteCount) throws {
        guard bandwidth.value == 0 || (16 << 10...1 << 50).contains(bandwidth.value) else {
            throw ValidationError("--bandwidth takes 16K to 1P, in bytes a second, or 0 for no limit: 4M")
        }
    }

    /// Checks what they may be; the commands do it in their own order.
    func check() throws {
        guard (1...64).contains(connections) else { throw ValidationError("--connections takes 1 to 64") }
        guard (1...2_000_000).contains(downtimeLimit.count) else {
            throw ValidationError("--downtime-limit takes 1 to 2000000 milliseconds")
        }
        guard (0...MigrationPlan.mostSlowDown).contains(slowDown) else {
            throw ValidationError("--slow-down takes 0 to \(MigrationPlan.mostSlowDown) percent")
        }
        guard (100...3_600_000).contains(blackoutDeadline.count), blackoutDeadline.count >= downtimeLimit.count else {
            throw ValidationError(
                "--blackout-deadline takes 100 to 3600000 milliseconds, and not less than --downtime-limit"
            )
        }
        try patience.checkPatience()
    }

    /// Writes them into a plan.
    func fill(_ plan: inout MigrationPlan) {
        plan.connections = connections
        plan.compression = compress
        plan.downtimeLimit = downtimeLimit.count
        plan.slowDownLimit = slowDown
        plan.blackoutDeadline = blackoutDeadline.count
        plan.keepSource = keepSource.seconds
        plan.patience = patience.seconds
    }
}
