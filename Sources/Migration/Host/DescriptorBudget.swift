internal import CLinux
internal import Glibc
internal import IO

/// How many files and connections a process may have open, and what a migration takes of them.
public enum DescriptorBudget {
    /// What each disk takes besides its connections: its image, the sockets to QEMU or a storage daemon, and a reader of digests.
    private static let forDisk = 3
    /// What a migration takes besides its disks: its connections, streams, journals, and what is open for a moment.
    private static let forMigration = 48
    /// How many connections a disk has as a rule.
    public static let usualConnections = 4

    /// Lets this process have as many as it may.
    public static func raise() { xd_raise_descriptor_limit() }

    /// Why this process cannot carry the disks of one more guest, a sentence with what to do; nil when it can.
    ///
    /// - Parameters:
    ///   - disks: how many they are.
    ///   - connections: of each of them.
    public static func shortage(disks: Int, connections: Int = usualConnections) -> String? {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return nil }
        let used = UInt64(DurableFile.list("/proc/self/fd").count)
        let needed = UInt64(forMigration + disks * (connections + forDisk))
        guard used + needed > UInt64(limit.rlim_cur) else { return nil }
        return
            "\(disks) disks with \(connections) connections each take about \(needed) descriptors, and this process has \(used) of at most "
            + "\(limit.rlim_cur) in use; raise that (LimitNOFILE= in its unit, ulimit -Hn in a shell)"
    }
}
