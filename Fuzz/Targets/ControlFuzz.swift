internal import Destination
internal import IO
internal import Migration
internal import TestSupport

/// What a source may say on its control connection: frames are received as the destination receives them, and what each message
/// means goes into the rules of `DestinationHandover`, with whatever comes of the work that these ask for.
enum ControlFuzz {
    private static let loop = EventLoop(name: "fuzz-control")

    /// An input of bytes that are frames, when the first one is 0; otherwise a line for each thing that happens:
    ///
    ///     OUTCOMES{JSON}     a message, and what comes of the work that it leads to: see `Driver.outcome`
    ///     OUTCOMES!LETTER    something else: see `Driver.happening`
    static func conversation(_ input: UnsafeRawBufferPointer) {
        guard let first = input.first else { return }
        let bytes = Array(input)
        let done = Gate()
        let loop = loop
        Task(executorPreference: loop) {
            if first == 0 {
                await receive(Array(bytes.dropFirst()))
            } else {
                var driver = Driver()
                for line in bytes.split(separator: 10).prefix(256) { await driver.take(Array(line)) }
            }
            done.open()
        }
        done.wait()
    }

    private static func receive(_ bytes: [UInt8]) async {
        let (near, far) = MemoryChannel.pair(on: loop, capacity: bytes.count + 4096)
        try? await far.write(bytes)
        far.close()
        let connection = MessageConnection(near)
        connection.limit = 64 << 10
        while let frame = try? await connection.receive() {
            guard case .message(let message) = frame else { continue }
            _ = try? DestinationHandover.Event(message, in: .new)
        }
        near.close()
    }

    /// A message as it comes out of a frame; nil when it is none.
    private static func decode(_ json: [UInt8]) async -> Message? {
        let length = UInt32(json.count)
        let header = [24, 16, 8, 0].map { UInt8(truncatingIfNeeded: length >> $0) } + [1]
        let (near, far) = MemoryChannel.pair(on: loop, capacity: json.count + 4096)
        defer {
            near.close()
            far.close()
        }
        try? await far.write(header + json)
        return try? await MessageConnection(near).receiveMessage()
    }

    /// Carries out what the handover asks for, as the input says, and holds it to what must never be.
    private struct Driver {
        private var handover = DestinationHandover()
        private var isOwned = false
        private var isRefused = false
        private var pending: JournalRecord?

        mutating func take(_ line: [UInt8]) async {
            guard let start = line.firstIndex(where: { $0 == UInt8(ascii: "{") || $0 == UInt8(ascii: "!") }) else {
                return
            }
            var outcomes = line[..<start]
            let event: DestinationHandover.Event?
            if line[start] == UInt8(ascii: "!") {
                event = Self.happening(line[(start + 1)...].first ?? 0)
            } else if let message = await ControlFuzz.decode(Array(line[start...])) {
                do { event = try DestinationHandover.Event(message, in: handover.onWire) } catch {
                    event = .failed("\(error)")
                }
            } else {
                event = .connectionLost
            }
            guard let event else { return }
            perform(event, &outcomes)
        }

        private mutating func perform(_ event: DestinationHandover.Event, _ outcomes: inout ArraySlice<UInt8>) {
            var actions = handover.handle(event)
            var count = 0
            while !actions.isEmpty {
                count += 1
                precondition(count < 1000, "one event leads to actions without end")
                let action = actions.removeFirst()
                check(action)
                guard let next = outcome(of: action, outcomes.popFirst() ?? UInt8(ascii: "k")) else { continue }
                if next == .durable, let pending { noteDurable(pending) }
                actions += handover.handle(next)
            }
        }

        /// The rules of `docs/model/README.md` that a source must not be able to break.
        private mutating func check(_ action: DestinationHandover.Action) {
            switch action {
            case .admit:
                precondition(isOwned, "a guest is resumed that does not belong to this host durably")
                precondition(!isRefused, "a guest is resumed that was refused durably")
            case .answer(.refused): precondition(isRefused, "RELEASE is refused, and that is not durable")
            case .answer(.owned): precondition(isOwned, "OWNED is said, and that is not durable")
            case .append(let record): pending = record
            default: break
            }
        }

        private mutating func noteDurable(_ record: JournalRecord) {
            switch record {
            case .owner, .taken: isOwned = true
            case .rolledBack, .overruled: isRefused = true
            default: break
            }
        }

        /// What comes of an action: f failed, r refused, n not written, u may be written, w flawed, s stands still, otherwise it is well.
        private func outcome(of action: DestinationHandover.Action, _ letter: UInt8) -> DestinationHandover.Event? {
            let letter = Unicode.Scalar(letter)
            switch action {
            case .append: return letter == "n" ? .notWritten("ENOSPC") : letter == "u" ? .doubtful("EIO") : .durable
            case .admit:
                return letter == "n" ? .notResumed("no") : letter == "w" ? .emulatorEnded("", isCut: false) : .resumed
            case .carryOut(.examine):
                return letter == "w"
                    ? .flawed("no") : letter == "f" ? .failed("no") : .sound(digests: [:], stands: letter == "s")
            case .carryOut(let step):
                return letter == "f" ? .failed("no") : letter == "r" ? .refused(["no"]) : .carriedOut(step)
            default: return nil
            }
        }

        /// What happens beside the messages.
        private static func happening(_ letter: UInt8) -> DestinationHandover.Event? {
            switch Unicode.Scalar(letter) {
            case "c": .connected
            case "l": .connectionLost
            case "a": .absenceEnded("5 minutes")
            case "e": .emulatorEnded("no", isCut: false)
            case "i": .emulatorEnded("no", isCut: true)
            case "t": .take(by: "root")
            case "s": .agentStops
            case "y": .tryAgain
            default: nil
            }
        }
    }
}
