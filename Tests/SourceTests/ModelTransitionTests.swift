import Emulator
import Migration
import TestSupport
import Testing

@testable import Source

/// The handover's value and the Promela model of it, which is searched exhaustively, have the same transitions.
@Suite(.timeLimit(.minutes(5)))
struct ModelTransitionTests {
    /// What a state of the value is called in the model; nil for what comes before it begins.
    private static func name(_ handover: SourceHandover) -> String? {
        switch handover {
        case .checking, .offering, .readying, .copying: nil
        case .sending, .retrying, .paused: "MIGRATE"
        case .asking: "ASKED"
        case .continuing: "WENT"
        case .completed: "SEEN"
        case .fenced: "FENCED"
        case .frozen: "FROZEN"
        case .releasing: "RELEASING"
        case .inDoubt: "DOUBT"
        case .released: "RELEASE"
        case .reclaiming: "TAKE"
        // Whoever is not to be told has said itself that it will never run the guest.
        case .restoring(let rollBack), .telling(let rollBack), .closing(let rollBack):
            rollBack.telling == .needless ? "TAKEN" : { if case .restoring = handover { "ROLL" } else { "ABORT" } }()
        case .owned, .over: "GONE"
        }
    }

    /// The model writes a record in two steps where the value has one duty, and waits where the value's duty goes on.
    private static func folded(_ name: String) -> String { name == "TAKING" ? "TAKE" : name }

    private struct Transition: Hashable, CustomStringConvertible {
        var from: String
        var to: String
        var description: String { "\(from) -> \(to)" }
    }

    /// What tells states apart as far as what follows from them goes.
    private static func key(_ handover: SourceHandover) -> String {
        switch handover {
        case .inDoubt(let rollBack), .reclaiming(let rollBack), .restoring(let rollBack), .telling(let rollBack),
            .closing(let rollBack):
            "\(handover.kind) \(rollBack.telling) \(rollBack.isRestored)"
        default: handover.kind.rawValue
        }
    }

    /// Every state that can be reached, from a migration's beginning and from what a recovery finds, with every event.
    private static func ofTheValue() -> Set<Transition> {
        var found: Set<Transition> = []
        let standings: [SourceStanding] = [.open, .released, .reclaimed(reason: "x")]
        var open =
            [SourceHandover.checking]
            + standings.compactMap { SourceHandover.resuming($0, guest: .running, reason: SourceHandoverTests.reason) }
        var seen = Set(open.map(key))
        while let state = open.popLast() {
            for event in SourceHandoverTests.everyEvent {
                // An operator's word is not in the model.
                if case .overruled = event { continue }
                var next = state
                next.take(event)
                if seen.insert(key(next)).inserted { open.append(next) }
                guard let from = name(state), let to = name(next), from != to else { continue }
                found.insert(Transition(from: from, to: to))
            }
        }
        return found
    }

    @Test func theValueAndTheModelHaveTheSameTransitions() async throws {
        let told = try await Tool.run(["\(SourceTestsPaths.repository)/docs/model/transitions"])
        #expect(told.code == 0, "\(told.all)")
        var model: Set<Transition> = []
        for line in told.output.split(separator: "\n") {
            let names = line.split(separator: " ").map { Self.folded(String($0)) }
            guard names.count == 2, names[0] != names[1] else { continue }
            model.insert(Transition(from: names[0], to: names[1]))
        }
        #expect(model.count > 15)
        let value = Self.ofTheValue()
        #expect(value.subtracting(model).isEmpty, "only in the value: \(value.subtracting(model))")
        #expect(model.subtracting(value).isEmpty, "only in the model: \(model.subtracting(value))")
    }
}

enum SourceTestsPaths {
    /// The repository's root.
    static let repository = #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" }
}
