internal import FoundationEssentials
internal import Glibc
internal import IO

/// A guest's place among the units of systemd: a scope of its own in `crossdock-guests.slice`, so that it is no part of whoever
/// started it (`org.freedesktop.systemd1.Manager.StartTransientUnit`).
public enum GuestScope {
    /// Where systemd shows that it is the host's first process.
    private static let mark = "/run/systemd/system"

    /// The name of the scope of a guest's process.
    ///
    /// - Parameter guest: a name that `GuestStore.validate` lets through: letters, digits, '.', '_' and '-'.
    static func name(_ guest: String, _ process: EmulatorProcess) -> String {
        "crossdock-guest-\(guest)-\(process.pid).scope"
    }

    /// Moves a guest that was just started into a scope of its own.
    ///
    /// Nothing happens where systemd does not run, or where this process is not root: then the guest's unit is that of whoever
    /// started it, as with any program.
    ///
    /// - Returns: why the guest stays where it is although systemd runs; nil when there is nothing to say.
    public static func place(_ guest: String, _ process: EmulatorProcess) async -> String? {
        guard geteuid() == 0, DurableFile.exists(mark) else { return nil }
        guard EmulatorProcess.find("busctl") != nil else {
            return
                "Guest '\(guest)' stays in the unit of whoever started it: there is no busctl to ask systemd for a scope"
        }
        let command = [
            "busctl", "--quiet", "--timeout=5", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1",
            "org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", name(guest, process), "fail",
            "5", "Slice", "s", "crossdock-guests.slice", "Description", "s", "Crossdock guest \(guest)",
            "TasksMax", "t", "\(UInt64.max)", "CollectMode", "s", "inactive-or-failed",
            "PIDs", "au", "1", "\(process.pid)", "0",
        ]
        do {
            return try await BlockingPool.shared.run {
                let helper = try BoundProcess(command, directory: try BoundProcess.makeDirectory())
                guard let code = helper.waitForEnd(.seconds(10)) else {
                    return
                        "Guest '\(guest)' stays in the unit of whoever started it: systemd did not answer within 10 s"
                }
                defer { helper.clear() }
                guard code != 0, process.isRunning else { return nil }
                return
                    "Guest '\(guest)' stays in the unit of whoever started it: systemd gives it no scope: \(helper.words)"
            }
        } catch { return "Guest '\(guest)' stays in the unit of whoever started it: \(error)" }
    }
}
