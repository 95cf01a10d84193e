import Testing

@testable import Source

/// What the disks of a guest get of what its operator allows them.
struct BandwidthSharesTests {
    @Test func equalPartsAtFirst() {
        #expect(
            BandwidthShares(total: 1_000_000).speeds([true, true, true, true]) == Array(repeating: 250_000, count: 4)
        )
        #expect(BandwidthShares(total: 1_000_000).speeds([false, false]) == [500_000, 500_000])
    }

    @Test func whoHasToCatchUpGetsWhatTheOthersDoNotNeed() {
        let speeds = BandwidthShares(total: 1_000_000).speeds([false, true, false, false])
        #expect(speeds == [25_000, 925_000, 25_000, 25_000])
        #expect(BandwidthShares(total: 1_000_000).speeds([false, true, true]).reduce(0, +) <= 1_000_000)
    }

    @Test(arguments: [[], [true], [false, true]]) func noLimitIsNoneForAnybody(disks: [Bool]) {
        #expect(BandwidthShares(total: 0).speeds(disks) == disks.map { _ in 0 })
    }

    @Test func nobodyStandsStill() {
        for total: UInt64 in [1, 16 << 10, 1 << 50] {
            for count in [1, 2, 64] {
                for behind in 0...count {
                    let speeds = BandwidthShares(total: total).speeds((0..<count).map { $0 < behind })
                    #expect(speeds.allSatisfy { $0 > 0 })
                }
            }
        }
    }
}
