import Migration
import TestSupport
import Testing

@testable import Destination

/// The handover's value and the Promela model of it, which is searched exhaustively, have the same transitions.
@Suite(.timeLimit(.minutes(5)))
struct ModelTransitionTests {
    /// What a state of the value is called in the model; nil for what comes before it begins, and for an operator's word.
    private static func name(_ handover: DestinationHandover) -> String? {
        switch handover.state {
        case .stuck, .new, .offered(_, isBegun: false), .writingOverruled, .overruled, .aborted(_, .none): nil
        // What could not be written at all is as before, but that QEMU has ended.
        case .offered, .ready, .settling, .aborted(_, .missing): "OPEN"
        case .writingPrepared: "W_PREPARED"
        case .prepared, .examining, .noting: "PREPARED"
        case .writingOwner: "W_OWNER"
        case .ownerInDoubt: "OWNER_DOUBT"
        case .owner, .owned, .done: "OWNER"
        case .writingRolledBack(let refusal):
            if case .overruled = refusal.record { nil } else { "W_ROLLEDBACK" }
        case .rolledBackInDoubt(let refusal):
            if case .overruled = refusal.record { nil } else { "ROLLEDBACK_DOUBT" }
        case .aborted(_, .durable): "ABORTED"
        }
    }

    /// Every state that can be reached, from a migration's beginning and from what an earlier agent has left, with every event.
    private static func ofTheValue() -> Set<String> {
        var found: Set<String> = []
        var open = [DestinationHandover(), DestinationHandover(.stuck)]
        var known = Set(open)
        while let state = open.popLast() {
            for event in DestinationHandover.Event.samples where state.isAwaiting(event) {
                switch event {
                case .take, .overruled: continue
                default: break
                }
                var next = state
                _ = next.handle(event)
                if known.insert(next).inserted { open.append(next) }
                guard let from = name(state), let to = name(next), from != to else { continue }
                found.insert("\(from) -> \(to)")
            }
        }
        return found
    }

    @Test func theValueAndTheModelHaveTheSameTransitions() async throws {
        let repository = #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" }
        let told = try await Tool.run(["\(repository)/docs/model/transitions"], seconds: 240)
        #expect(told.code == 0, "\(told.all)")
        var model: Set<String> = []
        for line in told.output.split(separator: "\n") {
            let names = line.split(separator: " ")
            if names.count == 3, names[0] == "destination" { model.insert("\(names[1]) -> \(names[2])") }
        }
        #expect(model.count > 10)
        let value = Self.ofTheValue()
        #expect(value.subtracting(model).isEmpty, "only in the value: \(value.subtracting(model).sorted())")
        #expect(model.subtracting(value).isEmpty, "only in the model: \(model.subtracting(value).sorted())")
    }
}
