import Glibc
import IO

/// Random conversations with an NBD server, and the classes of its answers.
enum Differential {
    /// A small generator with a seed, so that a failure can be repeated (xorshift).
    struct Generator: RandomNumberGenerator {
        private var state: UInt64
        init(seed: UInt64) { state = seed }
        mutating func next() -> UInt64 {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return state
        }
    }

    /// One thing that is said.
    enum Step: Equatable, CustomStringConvertible {
        case option(UInt32, [UInt8])
        case request(flags: UInt16, command: UInt16, offset: UInt64, length: UInt32)

        var description: String {
            switch self {
            case .option(let number, let payload): "option \(number) \(payload)"
            case .request(let flags, let command, let offset, let length):
                "command \(command) flags \(flags) at \(offset) of \(length)"
            }
        }
    }

    private static func big<T: FixedWidthInteger>(_ value: T) -> [UInt8] {
        withUnsafeBytes(of: value.bigEndian) { Array($0) }
    }
    private static func text(_ value: String) -> [UInt8] { big(UInt32(value.utf8.count)) + Array(value.utf8) }

    /// Some options, then GO, then some requests.
    ///
    /// What is left out because QEMU does not do as it must, or may choose: STARTTLS (with data it hangs up), the empty name (here it
    /// means the only export), lengths of zero,
    /// reads beyond the maximum, flags on DISC.
    static func script(_ generator: inout Generator) -> [Step] {
        var steps: [Step] = []
        for _ in 0..<Int.random(in: 0...5, using: &generator) {
            let names = ["disk", "disk", "nothing", "dis", "disk2"]
            let name = names.randomElement(using: &generator) ?? ""
            let queries = ["base:allocation", "base:", "qemu:allocation-depth", "x:y", "base:other", "qemu:"]
            switch Int.random(in: 0...8, using: &generator) {
            case 0: steps.append(.option(3, []))
            case 1: steps.append(.option(8, []))
            case 2: steps.append(.option(UInt32.random(in: 20...1000, using: &generator), [1, 2, 3]))
            case 3:
                steps.append(.option(6, text(name) + big(UInt16(1)) + big(UInt16.random(in: 0...5, using: &generator))))
            case 4, 5:
                let option: UInt32 = Bool.random(using: &generator) ? 9 : 10
                let query = queries.randomElement(using: &generator) ?? ""
                steps.append(.option(option, text(name) + big(UInt32(1)) + text(query)))
            case 6: steps.append(.option(9, text(name) + big(UInt32(0))))
            case 7: steps.append(.option(6, text(name)))
            default: steps.append(.option(3, [9]))
            }
        }
        steps.append(.option(7, text("disk") + big(UInt16(0))))
        for _ in 0..<Int.random(in: 1...6, using: &generator) {
            let commands: [UInt16] = [0, 0, 1, 3, 4, 5, 6, 7, 7, 9, 77]
            let command = commands.randomElement(using: &generator) ?? 0
            let flags: [UInt16] = [0, 0, 0, 1, 2, 4, 8, 16, 1 << 9]
            let offsets: [UInt64] = [0, 512, 4096, (1 << 20) - 512, 1 << 20, 1 << 40, UInt64.max - 511]
            let lengths: [UInt32] = command == 3 ? [0] : [512, 1024, 4096, 65536, 1 << 20]
            steps.append(
                .request(
                    flags: flags.randomElement(using: &generator) ?? 0,
                    command: command,
                    offset: command == 3 ? 0 : offsets.randomElement(using: &generator) ?? 0,
                    length: lengths.randomElement(using: &generator) ?? 512
                )
            )
        }
        return steps
    }

    /// Plays a script and returns the class of each answer; the last one is "closed" when the server hung up.
    static func play(_ script: [Step], at path: String, on loop: EventLoop) async throws -> [String] {
        let channel = try await SocketChannel.connect(to: .unix(path: path), on: loop)
        defer { channel.close() }
        var answers: [String] = []
        do {
            _ = try await channel.read(exactly: 18)
            try await channel.write(big(UInt32(3)))
            for step in script {
                switch step {
                case .option(let number, let payload):
                    try await channel.write(
                        Array("IHAVEOPT".utf8) + big(number) + big(UInt32(payload.count)) + payload
                    )
                    let answer = try await optionAnswer(channel)
                    answers.append("option \(number): \(answer)")
                case .request(let flags, let command, let offset, let length):
                    var bytes = big(UInt32(0x2560_9513)) + big(flags) + big(command) + big(UInt64(7)) + big(offset)
                    bytes += big(length)
                    if command == 1 { bytes += [UInt8](repeating: 3, count: Int(length)) }
                    try await channel.write(bytes)
                    answers.append(
                        "command \(command): \(try await reply(channel, command == 0 ? Int(length) : 0))"
                    )
                }
            }
        } catch { answers.append("closed") }
        return answers
    }

    private static func integer(_ bytes: ArraySlice<UInt8>) -> UInt64 { bytes.reduce(0) { $0 << 8 | UInt64($1) } }

    /// The types of the replies to an option, texts aside.
    private static func optionAnswer(_ channel: SocketChannel) async throws -> String {
        var types: [String] = []
        while true {
            let header = try await channel.read(exactly: 20)
            let type = integer(header[12..<16])
            let payload = try await channel.read(exactly: Int(integer(header[16..<20])))
            if type == 4 {
                types.append("context \(String(decoding: payload.dropFirst(4), as: UTF8.self))")
            } else if type != 3 {
                types.append("\(type & 1 << 31 != 0 ? "error \(type & 0xff)" : "\(type)")")
            }
            if type == 1 || type & 1 << 31 != 0 { return types.joined(separator: " ") }
        }
    }

    /// ENOSPC for a write beyond the end, as the specification says, counts as EINVAL, which QEMU makes of it.
    private static func reply(_ channel: SocketChannel, _ length: Int) async throws -> String {
        let answer = try await error(channel, length)
        return "error \(answer == 28 ? 22 : answer)"
    }

    /// Whether a request failed, and with which error. How a reply is cut into chunks is the server's choice.
    private static func error(_ channel: SocketChannel, _ length: Int) async throws -> UInt64 {
        var error: UInt64 = 0
        while true {
            let magic = integer(try await channel.read(exactly: 4)[...])
            if magic == 0x6744_6698 {
                error = integer(try await channel.read(exactly: 12)[0..<4])
                if error == 0, length > 0 { _ = try await channel.read(exactly: length) }
                return error
            }
            let header = try await channel.read(exactly: 16)
            let payload = try await channel.read(exactly: Int(integer(header[12..<16])))
            if integer(header[2..<4]) & 1 << 15 != 0 { error = integer(payload[0..<4]) }
            if integer(header[0..<2]) & 1 != 0 { return error }
        }
    }
}
