/// Where hosts mount file systems of huge pages.
public enum HugePages {
    private static let roots: [String] =
        ["/dev/hugepages", "/run/hugepages", "/mnt/huge", "/mnt/hugepages", "/hugepages"]
        .flatMap { root in
            [root] + ["1G", "2M", "1GB", "2MB", "-1G", "-2M", "_1GB", "_2MB", "-1GB", "-2MB"].map { root + $0 }
        }
        + ["/run/hugepages/kvm"]

    /// The directory of huge pages that a path lies in; nil for any other path.
    ///
    /// What lies in it is somebody's: QEMU is given the directory alone, and makes a file of its own there.
    public static func root(of path: String) -> String? {
        guard !path.split(separator: "/").contains("..") else { return nil }
        return roots.filter { path == $0 || path.hasPrefix($0 + "/") }.max { $0.utf8.count < $1.utf8.count }
    }
}
