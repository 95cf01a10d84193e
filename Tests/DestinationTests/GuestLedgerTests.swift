import Emulator
import Testing

@testable import Destination

/// What is counted of the guests of a source.
struct GuestLedgerTests {
    private func record(_ name: String, _ source: String?, memory: UInt64) -> GuestRecord {
        var record = GuestRecord(name: name, commandLine: GuestCommandLine(arguments: ["qemu"], directory: "/"))
        record.arrival = source.map { .init(source: $0, usage: GuestUsage(memory: memory)) }
        return record
    }

    @Test func aGuestCountsOnceFromItsOfferUntilItLeaves() {
        var ledger = GuestLedger([
            record("web1", "a", memory: 1), record("own", nil, memory: 2), record("web2", "b", memory: 4),
        ])
        #expect(ledger.usages(of: "a", but: "") == [GuestUsage(memory: 1)])
        #expect(ledger.usages(of: "c", but: "").isEmpty)
        ledger.begin("m1", guest: "web3", .init(source: "a", usage: GuestUsage(memory: 8)))
        #expect(ledger.usages(of: "a", but: "").reduce(GuestUsage(), +).memory == 9)
        #expect(ledger.usages(of: "a", but: "m1") == [GuestUsage(memory: 1)])
        ledger.settle("m1")
        ledger.drop("m1")
        #expect(ledger.usages(of: "a", but: "m1").reduce(GuestUsage(), +).memory == 9)
        #expect(Set(ledger.residents(of: "a")) == ["web1", "web3"])
        // One left, and one was forgotten.
        var left = record("web1", "a", memory: 1)
        left.released = .init(migration: "m2", destination: "elsewhere")
        ledger.refresh(["web1": left, "web3": nil])
        #expect(ledger.usages(of: "a", but: "").isEmpty)
        #expect(GuestLedger([left]).residents(of: "a").isEmpty)
    }

    @Test func aGuestThatDoesNotComeIsForgotten() {
        var ledger = GuestLedger()
        ledger.begin("m1", guest: "web1", .init(source: "a", usage: GuestUsage(disk: 1)))
        #expect(ledger.arrival("m1")?.source == "a")
        ledger.drop("m1")
        ledger.settle("m1")
        #expect(ledger.usages(of: "a", but: "").isEmpty && ledger.arrival("m1") == nil)
    }
}
