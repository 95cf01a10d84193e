internal import Glibc

/// Namespaces that a test makes for its own processes; without root they are inside a user namespace.
public enum Namespace {
    private static let isRoot = geteuid() == 0

    /// Runs what follows in a mount namespace of its own.
    public static let mount = isRoot ? ["unshare", "-m"] : ["unshare", "-Urm"]
    /// Runs what follows in a network namespace of its own.
    public static let network = isRoot ? ["unshare", "-n"] : ["unshare", "-Urn"]

    /// Runs what follows in a network namespace of its own that can have its own `/sys`.
    public static let host = isRoot ? ["unshare", "-nm"] : ["unshare", "-Urnm"]

    /// Runs what follows in a network namespace of its own whose loopback loses every packet: none fits into the burst.
    public static let blackHole =
        network + [
            "sh", "-c",
            "ip link set lo up && tc qdisc add dev lo root tbf rate 8bit burst 10 latency 1ms && exec \"$@\"", "sh",
        ]

    /// Runs what follows in the mount namespace of a process.
    public static func enter(_ process: Int32) -> [String] {
        ["nsenter", "-t", "\(process)"] + (isRoot ? [] : ["-U", "--preserve-credentials"]) + ["-m"]
    }

    /// Runs what follows in the network namespace of a process.
    public static func enterNetwork(_ process: Int32) -> [String] {
        ["nsenter", "-t", "\(process)"] + (isRoot ? [] : ["-U", "--preserve-credentials"]) + ["-n"]
    }

    /// Runs what follows in the network and mount namespaces of a process.
    public static func enterHost(_ process: Int32) -> [String] { enterNetwork(process) + ["-m"] }
}
