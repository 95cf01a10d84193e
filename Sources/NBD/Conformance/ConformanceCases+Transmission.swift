internal import IO

extension Conformance {
    private static let invalid: UInt32 = 22
    private static let read = NBDCommand.read.rawValue
    private static let write = NBDCommand.write.rawValue
    private static let zeroes = NBDCommand.writeZeroes.rawValue
    private static let status = NBDCommand.blockStatus.rawValue
    private static let trim = NBDCommand.trim.rawValue
    private static let flush = NBDCommand.flush.rawValue

    static let transmissionCases: [ConformanceCase] = [
        ConformanceCase(
            "T-40.bad-magic",
            "Request message",
            "A request with a wrong magic ends the connection, without a reply."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try await probe.send([UInt8](repeating: 0x11, count: 28))
                try await probe.expectClosed("the client sent a wrong magic")
            }
        },
        ConformanceCase(
            "T-41.unknown-command",
            "Request types",
            "An unknown command is EINVAL, and the next request works."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                for command: UInt16 in [9, 0x7fff, 0xffff] {
                    let answer = try await probe.perform(command, length: probe.unit)
                    try test.require(
                        answer.error == invalid,
                        "command \(command) was answered with error \(answer.error)"
                    )
                }
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-41.unknown-flag", "Command flags", "An unknown flag is EINVAL, and the next request works.")
        { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                for command in [read, flush] {
                    let answer = try await probe.perform(
                        command,
                        flags: CommandFlags(rawValue: 1 << 14),
                        length: command == read ? probe.unit : 0
                    )
                    try test.require(
                        answer.error == invalid,
                        "flag 14 of command \(command) was answered with error \(answer.error)"
                    )
                }
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-42.nothing", "Request types", "Requests of zero bytes do not end the connection.") { test in
            try await test.connect { probe in
                try await probe.enter(.structured, contexts: ["base:allocation"])
                _ = try await probe.perform(read)
                _ = try await probe.perform(status)
                if probe.flags.contains(.sendCache) { _ = try await probe.perform(NBDCommand.cache.rawValue) }
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-43.unaligned", "Block size constraints", "An unaligned request is EINVAL.") { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                let minimum = UInt64(probe.blockSizes?.minimum ?? 1)
                try test.skip(unless: minimum > 1, "the server takes every offset")
                for (offset, length) in [(1, minimum), (0, minimum + 1)] as [(UInt64, UInt64)] {
                    let answer = try await probe.perform(read, offset: offset, length: length)
                    try test.require(answer.error == invalid, "it was answered with error \(answer.error)")
                }
            }
        },
        ConformanceCase(
            "T-44.beyond-end",
            "Request types",
            "Reading beyond the end is EINVAL, also when the sum overflows."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                let ranges: [(UInt64, UInt64)] = [
                    (probe.size, probe.unit), (probe.size &- probe.unit, 2 * probe.unit),
                    (UInt64.max - (probe.unit - 1), probe.unit), (UInt64.max &- (2 * probe.unit - 1), 4 * probe.unit),
                    (1 << 63, probe.unit),
                ]
                for (offset, length) in ranges {
                    let answer = try await probe.perform(read, offset: offset, length: length)
                    try test.require(
                        answer.error == invalid,
                        "a read at \(offset) was answered with error \(answer.error)"
                    )
                }
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-46.large-read",
            "Block size constraints",
            "A read of 2^32-1 bytes is an error, and the next request works."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try test.skip(unless: probe.size < 1 << 32, "the export is larger")
                try await probe.send(read, length: 0xffff_ffff)
                let answer = try await probe.answer()
                try test.require(answer.error != 0, "it was answered without an error")
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-47.fua", "NBD_CMD_FLAG_FUA", "FUA is taken on every command when it is offered.") { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try test.skip(unless: probe.flags.contains(.sendFUA), "the server does not offer FUA")
                let answer = try await probe.perform(read, flags: .fua, length: probe.unit)
                try test.require(answer.error == 0, "a read with FUA was answered with error \(answer.error)")
                if probe.flags.contains(.sendFlush) {
                    let answer = try await probe.perform(flush, flags: .fua)
                    try test.require(answer.error == 0, "a flush with FUA was answered with error \(answer.error)")
                }
            }
        },
        ConformanceCase("T-48.flush", "NBD_CMD_FLUSH", "FLUSH works when it is offered.") { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try test.skip(unless: probe.flags.contains(.sendFlush), "the server does not offer FLUSH")
                let answer = try await probe.perform(flush)
                try test.require(answer.error == 0, "it was answered with error \(answer.error)")
            }
        },
        ConformanceCase(
            "T-49.structured-read",
            "Structured reply types",
            "The chunks of a read are in it, do not overlap and are complete."
        ) { test in
            try await test.connect { probe in
                try await probe.enter()
                let count = Int(min(probe.size, 1 << 20) & ~(probe.unit - 1))
                let whole = try await probe.read(at: 0, count)
                try test.require(
                    try await probe.read(at: 0, Int(probe.unit)) == Array(whole[..<Int(probe.unit)]),
                    "two reads differ"
                )
            }
        },
        ConformanceCase("T-49.df", "NBD_CMD_FLAG_DF", "A read of 64 KiB with DF is one chunk of data.") { test in
            try await test.connect { probe in
                try await probe.enter()
                try test.skip(unless: probe.flags.contains(.sendDF), "the server does not offer DF")
                let count = min(probe.size & ~(probe.unit - 1), 65536)
                let answer = try await probe.perform(read, flags: .doNotFragment, length: count)
                let content = answer.chunks.filter { $0.type != NBDChunk.none }
                try test.require(answer.error == 0 && content.count == 1, "it came in \(content.count) chunks")
            }
        },
        ConformanceCase(
            "T-49.no-simple-read",
            "Structured reply message",
            "With structured replies a read is never answered with a simple one."
        ) { test in
            try await test.connect { probe in
                try await probe.enter()
                let answer = try await probe.perform(read, length: probe.unit)
                try test.require(!answer.isSimple, "it was")
            }
        },
        ConformanceCase(
            "T-51.status",
            "NBD_CMD_BLOCK_STATUS",
            "Extents are not empty, and only the last may reach beyond the request."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.structured, contexts: ["base:allocation"])
                let length = min(probe.size, 1 << 30) & ~(probe.unit - 1)
                let answer = try await probe.perform(status, length: length)
                try test.require(answer.error == 0, "it was answered with error \(answer.error)")
                try test.require(answer.chunks.count == 1, "there are \(answer.chunks.count) chunks for one context")
                let lengths = try extents(answer.chunks[0].payload, probe.contexts[0].id)
                let before = lengths.dropLast().reduce(0, +)
                try test.require(
                    lengths.allSatisfy { $0 > 0 } && before < length,
                    "the extents are \(lengths.prefix(8))"
                )
            }
        },
        ConformanceCase("T-51.req-one", "NBD_CMD_FLAG_REQ_ONE", "With REQ_ONE there is one extent, within the request.")
        { test in
            try await test.connect { probe in
                try await probe.enter(.structured, contexts: ["base:allocation"])
                let length = min(probe.size, 1 << 20) & ~(probe.unit - 1)
                let answer = try await probe.perform(status, flags: .requestOne, length: length)
                try test.require(
                    answer.error == 0 && answer.chunks.count == 1,
                    "it was answered with error \(answer.error)"
                )
                let lengths = try extents(answer.chunks[0].payload, probe.contexts[0].id)
                try test.require(lengths.count == 1 && lengths[0] <= length, "the extents are \(lengths.prefix(8))")
            }
        },
        ConformanceCase("T-51.no-context", "NBD_CMD_BLOCK_STATUS", "Without a context it is EINVAL.") { test in
            try await test.connect { probe in
                try await probe.enter()
                let answer = try await probe.perform(status, length: probe.unit)
                try test.require(answer.error == invalid, "it was answered with error \(answer.error)")
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-51.longest", "NBD_CMD_BLOCK_STATUS", "The longest length of a compact header does no harm.")
        { test in
            try await test.connect { probe in
                try await probe.enter(.structured, contexts: ["base:allocation"])
                _ = try await probe.perform(status, length: 0xffff_ffff)
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-54.same-cookie", "Request message", "Two requests with one cookie are both answered.") {
            test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try await probe.send(read, length: probe.unit)
                try await probe.send(read, offset: 0, length: probe.unit)
                for _ in 0..<2 {
                    let answer = try await probe.answer(length: Int(probe.unit))
                    try test.require(answer.cookie == ConformanceProbe.cookie && answer.error == 0, "one was lost")
                }
            }
        },
        ConformanceCase(
            "T-55.disconnect",
            "NBD_CMD_DISC",
            "DISC behind requests ends the connection after them, without a reply."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                for _ in 0..<8 { try await probe.send(read, length: probe.unit) }
                try await probe.send(NBDCommand.disconnect.rawValue, flags: [], offset: 7, length: 9)
                for _ in 0..<8 {
                    let answer = try await probe.answer(length: Int(probe.unit))
                    try test.require(answer.error == 0, "a read before DISC failed")
                }
                try await probe.expectClosed("the client sent DISC")
            }
        },
        ConformanceCase(
            "T-57.never-reads",
            "not in the specification",
            "A client that never reads does not keep others from being served."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                let length = min(probe.size & ~(probe.unit - 1), 1 << 20)
                try? await probe.channel.withDeadline(.milliseconds(500), for: "sending") {
                    for _ in 0..<4096 { try await probe.send(read, length: length) }
                }
                try await test.connect { other in
                    try await other.enter(.simple)
                    try await other.expectServing()
                }
            }
        },
    ]

    /// The lengths of the extents of a block status in compact form.
    private static func extents(_ payload: [UInt8], _ context: UInt32) throws -> [UInt64] {
        var reader = MessageReader(payload)
        guard reader.integer(UInt32.self) == context, reader.count > 0, reader.count % 8 == 0 else {
            throw ConformanceFailure(text: "the block status is malformed, or of another context")
        }
        var lengths: [UInt64] = []
        while let length = reader.integer(UInt32.self), reader.integer(UInt32.self) != nil {
            lengths.append(UInt64(length))
        }
        return lengths
    }

    /// A probe in the transmission phase of an export that may be written.
    private static func writable(
        _ test: ConformanceContext,
        _ form: HeaderForm = .simple,
        contexts: [String] = [],
        _ body: (ConformanceProbe) async throws -> Void
    ) async throws {
        try test.skip(unless: test.target.mayWrite, "writes: ask for cases that write")
        try await test.connect { probe in
            try await probe.enter(form, contexts: contexts)
            try test.skip(unless: !probe.flags.contains(.readOnly), "the export is read-only")
            try test.skip(unless: probe.size >= 1 << 20, "the export is smaller than 1 MiB")
            try await body(probe)
        }
    }

    private static func good(_ test: ConformanceContext, _ answer: ConformanceProbe.Answer, _ what: String) throws {
        try test.require(answer.error == 0, "\(what) was answered with error \(answer.error)")
    }

    static let writeCases: [ConformanceCase] = [
        ConformanceCase(
            "T-41.write-unknown-flag",
            "Command flags",
            "The data of a write with an unknown flag is consumed."
        ) { test in
            try await writable(test) { probe in
                let data = [UInt8](repeating: 3, count: 4096)
                let answer = try await probe.perform(
                    write,
                    flags: CommandFlags(rawValue: 1 << 14),
                    length: 4096,
                    payload: data
                )
                try test.require(answer.error == invalid, "it was answered with error \(answer.error)")
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-42.write-nothing",
            "Request types",
            "Writes, trims and zeroes of zero bytes do not end the connection."
        ) { test in
            try await writable(test) { probe in
                _ = try await probe.perform(write)
                if probe.flags.contains(.sendTrim) { _ = try await probe.perform(trim) }
                if probe.flags.contains(.sendWriteZeroes) { _ = try await probe.perform(zeroes) }
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-44.write-beyond-end",
            "Request types",
            "Writing beyond the end is ENOSPC or EINVAL, and its data is consumed."
        ) { test in
            try await writable(test) { probe in
                for offset in [probe.size, UInt64.max - 511] {
                    let answer = try await probe.perform(
                        write,
                        offset: offset,
                        length: 512,
                        payload: [UInt8](repeating: 1, count: 512)
                    )
                    try test.require(
                        [28, invalid].contains(answer.error),
                        "it was answered with error \(answer.error)"
                    )
                }
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-45.read-only",
            "NBD_FLAG_READ_ONLY",
            "Writes to a read-only export are EPERM, and their data is consumed."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                try test.skip(unless: probe.flags.contains(.readOnly), "the export is writable")
                let answer = try await probe.perform(write, length: 512, payload: [UInt8](repeating: 1, count: 512))
                try test.require(
                    [1, invalid].contains(answer.error),
                    "a write was answered with error \(answer.error)"
                )
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-46.large-write",
            "Block size constraints",
            "A write of more than the maximum is refused, or the client is dropped."
        ) { test in
            try await writable(test) { probe in
                let maximum = UInt64(probe.blockSizes?.maximum ?? 32 << 20)
                try test.skip(unless: maximum <= 64 << 20, "the maximum is \(maximum) bytes")
                do {
                    try await probe.send(write, length: maximum + 4096)
                    let piece = [UInt8](repeating: 0, count: 1 << 20)
                    var rest = Int(maximum + 4096)
                    while rest > 0 {
                        try await probe.send(Array(piece[..<min(rest, piece.count)]))
                        rest -= piece.count
                    }
                    let answer = try await probe.answer()
                    try test.require(answer.error != 0, "it was accepted")
                } catch is ChannelError { return }
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-47.write-fua", "NBD_CMD_FLAG_FUA", "Writes, trims and zeroes take FUA when it is offered.") {
            test in
            try await writable(test) { probe in
                try test.skip(unless: probe.flags.contains(.sendFUA), "the server does not offer FUA")
                let data = [UInt8](repeating: 9, count: 4096)
                try good(
                    test,
                    try await probe.perform(write, flags: .fua, length: 4096, payload: data),
                    "a write with FUA"
                )
                if probe.flags.contains(.sendTrim) {
                    try good(
                        test,
                        try await probe.perform(trim, flags: .fua, offset: 8192, length: 4096),
                        "a trim with FUA"
                    )
                }
                if probe.flags.contains(.sendWriteZeroes) {
                    try good(test, try await probe.perform(zeroes, flags: .fua, length: 4096), "zeroes with FUA")
                    try test.require(
                        try await probe.read(at: 0, 4096).allSatisfy { $0 == 0 },
                        "zeroes are not read as such"
                    )
                }
            }
        },
        ConformanceCase(
            "T-52.zeroes",
            "NBD_CMD_WRITE_ZEROES",
            "Zeroes read as zeroes, with and without NO_HOLE, and their neighbours stay."
        ) { test in
            try await writable(test) { probe in
                try test.skip(unless: probe.flags.contains(.sendWriteZeroes), "the server does not offer WRITE_ZEROES")
                let data = [UInt8](repeating: 0x5a, count: 65536)
                for flags in [[], CommandFlags.noHole] as [CommandFlags] {
                    try good(test, try await probe.perform(write, length: 65536, payload: data), "a write")
                    try good(test, try await probe.perform(zeroes, flags: flags, offset: 8192, length: 16384), "zeroes")
                    let back = try await probe.read(at: 0, 65536)
                    try test.require(back[8192..<24576].allSatisfy { $0 == 0 }, "zeroes are not read as such")
                    try test.require(
                        (back[..<8192] + back[24576...]).allSatisfy { $0 == 0x5a },
                        "more was zeroed than asked"
                    )
                }
            }
        },
        ConformanceCase(
            "T-52.fast-zero",
            "NBD_CMD_FLAG_FAST_ZERO",
            "FAST_ZERO is EINVAL when it is not offered; else it works or is ENOTSUP."
        ) { test in
            try await writable(test) { probe in
                try test.skip(unless: probe.flags.contains(.sendWriteZeroes), "the server does not offer WRITE_ZEROES")
                let answer = try await probe.perform(zeroes, flags: .fastZero, length: 4096)
                if probe.flags.contains(.sendFastZero) {
                    try test.require([0, 95].contains(answer.error), "it was answered with error \(answer.error)")
                } else {
                    try test.require(answer.error == invalid, "it was answered with error \(answer.error)")
                }
            }
        },
        ConformanceCase(
            "T-56.half-write",
            "NBD_CMD_WRITE",
            "Nothing of a write is done when the client vanishes in the middle of its data."
        ) { test in
            try await writable(test) { probe in
                let old = [UInt8](repeating: 0x11, count: 65536)
                try good(test, try await probe.perform(write, length: 65536, payload: old), "a write")
                try await test.connect { victim in
                    try await victim.enter(.simple)
                    try await victim.send(write, length: 65536, payload: [UInt8](repeating: 0x22, count: 30000))
                }
                try test.require(try await probe.read(at: 0, 65536) == old, "a part of the write was done")
            }
        },
        ConformanceCase(
            "T-59.multi-conn",
            "NBD_FLAG_CAN_MULTI_CONN",
            "What one connection wrote and another flushed a third one reads."
        ) { test in
            try await writable(test) { first in
                try test.skip(
                    unless: first.flags.contains(.canMultiConn),
                    "the server does not offer several connections"
                )
                let data = (0..<4096).map { UInt8(truncatingIfNeeded: $0 * 13) }
                try good(test, try await first.perform(write, offset: 4096, length: 4096, payload: data), "a write")
                try await test.connect { second in
                    try await second.enter(.simple)
                    try good(test, try await second.perform(flush), "a flush")
                }
                try await test.connect { third in
                    try await third.enter(.simple)
                    try test.require(try await third.read(at: 4096, 4096) == data, "it reads something else")
                }
            }
        },
    ]

    static let extendedCases: [ConformanceCase] = [
        ConformanceCase(
            "T-36.extended-then-structured",
            "NBD_OPT_EXTENDED_HEADERS",
            "STRUCTURED_REPLY after it is ERR_EXT_HEADER_REQD; with data it is ERR_INVALID."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                let refused = try await probe.ask(11, [1]).last
                try test.skip(unless: refused?.type != NBDOptionReply.unsupported, "the server has no extended headers")
                try test.require(
                    refused?.type == NBDOptionReply.invalid,
                    "data was answered with \(ConformanceProbe.name(refused?.type ?? 0))"
                )
                try await probe.expect(11, [], NBDOptionReply.ack)
                try await probe.expect(8, [], NBDOptionReply.extendedHeadersRequired)
            }
        },
        ConformanceCase(
            "T-53.replies",
            "Extended reply chunk message",
            "Every reply has the extended header, and the offset of its request."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.extended)
                let answer = try await probe.perform(read, offset: probe.unit, length: probe.unit)
                try test.require(answer.chunks.allSatisfy { $0.offset == probe.unit }, "a chunk has another offset")
                let error = try await probe.perform(read, offset: probe.size, length: probe.unit)
                try test.require(
                    error.error == invalid && error.chunks.allSatisfy { $0.offset == probe.size },
                    "an error is wrong"
                )
                let flushed = try await probe.perform(flush)
                try test.require(flushed.error == 0, "a flush failed")
            }
        },
        ConformanceCase(
            "T-53.payload-flag",
            "NBD_CMD_FLAG_PAYLOAD_LEN",
            "A payload of a command that has none is consumed and EINVAL."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.extended)
                let answer = try await probe.perform(
                    read,
                    flags: .payloadLength,
                    length: 512,
                    payload: [UInt8](repeating: 1, count: 512)
                )
                try test.require(answer.error == invalid, "it was answered with error \(answer.error)")
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-53.unflagged-write",
            "NBD_CMD_FLAG_PAYLOAD_LEN",
            "A write without the flag, as QEMU's client sends it, has its payload all the same and is done."
        ) { test in
            try await writable(test, .extended) { probe in
                let data = [UInt8](repeating: 0x5e, count: Int(probe.unit))
                try await probe.send(write, offset: probe.unit, length: probe.unit, payload: data)
                let answer = try await probe.answer()
                try test.require(answer.error == 0, "it was answered with error \(answer.error)")
                try test.require(
                    try await probe.read(at: probe.unit, data.count) == data,
                    "something else was written"
                )
            }
        },
        ConformanceCase(
            "T-53.huge-payload",
            "NBD_CMD_FLAG_PAYLOAD_LEN",
            "A payload of more than the maximum ends the connection."
        ) { test in
            try await writable(test, .extended) { probe in
                try await probe.send(write, flags: .payloadLength, length: 1 << 40)
                try await probe.expectClosed("the client announced a payload of 1 TiB")
            }
        },
        ConformanceCase(
            "T-53.status-payload",
            "NBD_FLAG_BLOCK_STATUS_PAYLOAD",
            "A list of contexts selects among them; unknown and repeated ones are EINVAL."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.extended, contexts: ["base:allocation", "qemu:allocation-depth"])
                try test.skip(unless: probe.flags.contains(.blockStatusPayload), "the server does not offer it")
                func list(_ ids: [UInt32]) -> [UInt8] {
                    ConformanceProbe.message {
                        $0.append(probe.unit)
                        for id in ids { $0.append(id) }
                    }
                }
                let id = probe.contexts[0].id
                for (ids, error) in [([id], 0), ([id, id], invalid), ([id + 1000], invalid)] as [([UInt32], UInt32)] {
                    let payload = list(ids)
                    let answer = try await probe.perform(
                        status,
                        flags: .payloadLength,
                        length: UInt64(payload.count),
                        payload: payload
                    )
                    try test.require(answer.error == error, "the list \(ids) was answered with error \(answer.error)")
                    if error == 0 {
                        try test.require(answer.chunks.count == 1, "there are \(answer.chunks.count) chunks")
                    }
                }
                try await probe.expectServing()
            }
        },
        ConformanceCase(
            "T-53.long-effect",
            "Extended headers",
            "Zeroes, trims and block status take lengths beyond 2^32."
        ) { test in
            try await test.connect { probe in
                try await probe.enter(.extended, contexts: ["base:allocation"])
                let answer = try await probe.perform(status, length: probe.size)
                try test.require(
                    answer.error == 0,
                    "a status of the whole export was answered with error \(answer.error)"
                )
                let beyond = try await probe.perform(status, length: 1 << 62)
                try test.require(
                    beyond.error == invalid,
                    "a status of 2^62 bytes was answered with error \(beyond.error)"
                )
            }
        },
    ]
}
