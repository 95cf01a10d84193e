/// Whether a guest runs, and if not, why: `RunState` of QMP's `query-status`.
public enum RunState: String, Sendable, Hashable, Codable, CaseIterable {
    /// Its processors run.
    case running
    /// Somebody said `stop`, or QEMU waits with a guest that it has loaded.
    case paused
    /// A request to a disk failed, and QEMU keeps it until `cont`.
    case ioError = "io-error"
    /// Its kernel panicked, and QEMU was told to pause it then.
    case panicked = "guest-panicked"
    /// Its watchdog ran out, and QEMU was told to pause it then.
    case watchdog
    /// It has shut down, and QEMU was told to stay.
    case shutdown
    /// It was started with `-S` and never ran.
    case prelaunch
    /// It sleeps (ACPI S3).
    case suspended
    /// The processor could not go on.
    case internalError = "internal-error"
    /// A migration has stopped it and is not over.
    case finishMigrate = "finish-migrate"
    /// A migration has carried it away, as far as QEMU knows.
    case postmigrate
    /// It waits for a migration to bring it.
    case inmigrate
    /// A debugger has stopped it.
    case debug
    /// Its state is being read.
    case restoreVM = "restore-vm"
    /// Its state is being saved.
    case saveVM = "save-vm"
    /// It is one of a pair that runs in lockstep.
    case colo
    /// QEMU waits for its configuration.
    case preconfig

    /// What becomes of a guest in this state when its host is to hand it over.
    public enum Verdict: Sendable, Hashable {
        /// It moves, and runs there.
        case runs
        /// It moves, and stands still there as it does here.
        case stands
        /// It cannot move; the sentence's second half says why and what to do.
        case stays(String)
    }

    /// See `Verdict`. Which states arrive as themselves was measured on QEMU 7.2 and 10.0.
    public var verdict: Verdict {
        switch self {
        case .running, .suspended: .runs
        case .paused, .ioError, .panicked, .watchdog, .prelaunch: .stands
        case .shutdown: .stays("it has shut down; there is nothing to keep running, so start it there instead")
        case .internalError: .stays("its processor has failed; reset it first")
        case .postmigrate: .stays("an earlier migration has left it paused; 'crossdock recover' ends that")
        case .inmigrate: .stays("it has not arrived here yet")
        case .finishMigrate: .stays("another migration of it is under way")
        case .debug: .stays("a debugger has stopped it")
        case .restoreVM, .saveVM: .stays("its state is being read or saved")
        case .colo: .stays("it is one of a pair that runs in lockstep (COLO)")
        case .preconfig: .stays("its QEMU waits for its configuration")
        }
    }

    /// The states in which a QEMU that was started with `-S` may be when it has loaded a guest that was in this state: QEMU's
    /// stream does not tell running, paused and suspended apart, and a request that fails while the guest is being stopped makes
    /// a running one `io-error`.
    public var arrivals: Set<RunState> {
        switch self {
        case .running: [.paused, .ioError]
        case .ioError: [.ioError, .paused]
        case .suspended: [.paused, .suspended]
        case .paused, .panicked, .watchdog, .prelaunch: [self]
        default: []
        }
    }

    /// Whether it is a state that only a migration of its own QEMU brings about.
    public var isOfMigration: Bool { self == .finishMigrate || self == .postmigrate }

    /// For a sentence about the guest: "it is paused".
    public var sentence: String {
        switch self {
        case .running: "it runs"
        case .paused: "it is paused"
        case .ioError: "a request to one of its disks failed, and QEMU has stopped it (io-error)"
        case .panicked: "its kernel has panicked (guest-panicked)"
        case .watchdog: "its watchdog has stopped it"
        case .shutdown: "it has shut down"
        case .prelaunch: "it was never started (prelaunch)"
        case .suspended: "it sleeps (suspended)"
        default: "it is in the state '\(rawValue)'"
        }
    }
}
