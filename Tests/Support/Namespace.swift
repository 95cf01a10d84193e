internal import Glibc

/// Namespaces that a test makes for its own processes; without root they are inside a user namespace.
public enum Namespace {
    private static let isRoot = geteuid() == 0

    /// Runs what follows in a mount namespace of its own.
    public static let mount = isRoot ? ["unshare", "-m"] : ["unshare", "-Urm"]
    /// Runs what follows in a network namespace of its own.
    public static let network = isRoot ? ["unshare", "-n"] : ["unshare", "-Urn"]

    /// Runs what follows in the mount namespace of a process.
    public static func enter(_ process: Int32) -> [String] {
        ["nsenter", "-t", "\(process)"] + (isRoot ? [] : ["-U", "--preserve-credentials"]) + ["-m"]
    }

    /// Runs what follows in the network namespace of a process.
    public static func enterNetwork(_ process: Int32) -> [String] {
        ["nsenter", "-t", "\(process)"] + (isRoot ? [] : ["-U", "--preserve-credentials"]) + ["-n"]
    }
}
