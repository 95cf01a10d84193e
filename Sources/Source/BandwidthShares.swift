/// How the disks of a guest share what its operator allows them: who has to catch up gets what the others need not.
struct BandwidthShares {
    /// Bytes a second for all disks together; 0 for no limit.
    let total: UInt64

    /// The part of an equal share that a disk keeps which has caught up: its guest may write the next moment.
    private static let rest: UInt64 = 10
    /// Bytes a second that any disk has.
    private static let least: UInt64 = 4096

    /// Bytes a second for each disk.
    ///
    /// - Parameter catchesUp: for each disk, whether it has to catch up.
    /// - Returns: as many as there are disks, all 0 where there is no limit. Their sum is at most the total, as far as that is worth dividing.
    func speeds(_ catchesUp: [Bool]) -> [UInt64] {
        guard total > 0, !catchesUp.isEmpty else { return catchesUp.map { _ in 0 } }
        let equal = max(total / UInt64(catchesUp.count), Self.least)
        let behind = UInt64(catchesUp.count { $0 })
        guard behind > 0 else { return catchesUp.map { _ in equal } }
        let kept = max(equal / Self.rest, Self.least)
        let others = kept * (UInt64(catchesUp.count) - behind)
        let each = max((total - min(others, total)) / behind, Self.least)
        return catchesUp.map { $0 ? each : kept }
    }
}
