internal import IO

extension Conformance {
    private typealias Probe = ConformanceProbe

    static let handshakeCases: [ConformanceCase] = [
        ConformanceCase(
            "T-1.greeting",
            "Newstyle negotiation",
            "The greeting is NBDMAGIC, IHAVEOPT and both known flags."
        ) { test in
            try await test.connect { probe in
                let greeting = try await probe.channel.read(exactly: 18)
                try test.require(greeting == ServerHandshake.greeting, "the greeting is \(greeting)")
            }
        },
        ConformanceCase("T-2.unknown-flag", "Client flags", "A client with an unknown flag is dropped.") { test in
            try await test.connect { probe in
                try await probe.greet(flags: 1 << 7 | 3)
                try? await probe.send(Probe.option(3))
                try await probe.expectClosed("the client sent the flags 131")
            }
        },
        ConformanceCase("T-3.bad-magic", "Newstyle negotiation", "An option without IHAVEOPT ends the connection.") {
            test in
            try await test.connect { probe in
                try await probe.greet()
                try await probe.send([UInt8](repeating: 0x55, count: 16))
                try await probe.expectClosed("the client sent a wrong magic")
            }
        },
        ConformanceCase(
            "T-4.pipelined",
            "Fixed newstyle negotiation",
            "Two options in one segment are answered in order."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.send(Probe.option(0x1111) + Probe.option(0x2222, [1, 2, 3]))
                for number: UInt32 in [0x1111, 0x2222] {
                    let answer = try await probe.optionAnswer()
                    try test.require(answer.option == number, "option \(number) was not answered in its turn")
                }
            }
        },
        ConformanceCase("T-5.unknown-options", "Option types", "Unknown options are ERR_UNSUP, whatever their data.") {
            test in
            try await test.connect { probe in
                try await probe.begin()
                for number: UInt32 in [0, 4, 0x7f, 0xffff_ffff] {
                    for count in [0, 1, 4096] {
                        try await probe.expect(number, [UInt8](repeating: 7, count: count), NBDOptionReply.unsupported)
                    }
                }
            }
        },
        ConformanceCase(
            "T-6.too-long",
            "Termination of the session",
            "A too long option is refused and the next one works, or the client is dropped."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.send(Probe.option(7, [UInt8](repeating: 1, count: 4 + 4096 + 2 + 2 * 64 + 20_000)))
                do {
                    let answer = try await probe.answers(7).last
                    try test.require(NBDOptionReply.isError(answer?.type ?? 0), "the option was accepted")
                } catch is ChannelError { return }
                try await probe.expectAlive()
            }
        },
        ConformanceCase(
            "T-6.huge",
            "Termination of the session",
            "An option of 4 GiB ends the connection or is never waited for, and others are served."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.send(Probe.option(7, [], length: .max))
                try await test.connect { other in
                    try await other.begin()
                    try await other.expectAlive()
                }
            }
        },
        ConformanceCase(
            "T-7.every-byte",
            "Newstyle negotiation",
            "A client may vanish after each byte, and the next one is served."
        ) { test in
            var script = Probe.message { $0.append(UInt32(3)) }
            if test.target.credentials == nil {
                script += Probe.option(8) + Probe.option(7, Probe.goPayload(test.target.export))
            } else {
                script += Probe.option(5)
            }
            for count in 0...script.count {
                try await test.connect { probe in
                    _ = try await probe.channel.read(exactly: 18)
                    if count > 0 { try await probe.send(Array(script[..<count])) }
                }
            }
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expectAlive()
            }
        },
        ConformanceCase("T-7.byte-by-byte", "Newstyle negotiation", "A client may send one byte at a time.") { test in
            try await test.connect { probe in
                try await probe.greet()
                if test.target.credentials != nil { try await probe.secure() }
                for byte in Probe.option(0x4242, [1, 2, 3]) { try await probe.send([byte]) }
                let answer = try await probe.optionAnswer()
                try test.require(
                    answer.type == NBDOptionReply.unsupported,
                    "the option was answered with \(Probe.name(answer.type))"
                )
            }
        },
        ConformanceCase(
            "T-9.deadline",
            "not in the specification",
            "A client that says nothing is dropped within a minute."
        ) { test in
            try test.skip(unless: test.target.isPatient, "takes up to a minute: ask for slow cases")
            try await test.connect { probe in
                _ = try await probe.channel.read(exactly: 18)
                let buffer = IOBuffer(capacity: 16)
                do {
                    _ = try await probe.channel.withDeadline(.seconds(60), for: "waiting") {
                        try await probe.channel.readSome(into: buffer.mutable(0..<16))
                    }
                } catch let error as ChannelError {
                    try test.require(error.code != .timedOut, "the connection was still open after 60 s")
                }
            }
        },
    ]

    static let tlsCases: [ConformanceCase] = [
        ConformanceCase(
            "T-10.tls-required",
            "FORCEDTLS",
            "Before TLS every option but STARTTLS and ABORT is ERR_TLS_REQD."
        ) { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                let first = try await probe.ask(8)
                try test.skip(unless: first.last?.type != NBDOptionReply.ack, "the server leaves TLS to the client")
                for number: UInt32 in [3, 6, 7, 8, 9, 10] {
                    try await probe.expect(number, Probe.goPayload(test.target.export), NBDOptionReply.tlsRequired)
                }
            }
        },
        ConformanceCase("T-10.abort-before-tls", "NBD_OPT_ABORT", "ABORT is understood before TLS.") { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                try await probe.expect(2, [], NBDOptionReply.ack)
            }
        },
        ConformanceCase("T-10.export-name-before-tls", "FORCEDTLS", "EXPORT_NAME before TLS ends the connection.") {
            test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                let first = try await probe.ask(8)
                try test.skip(unless: first.last?.type != NBDOptionReply.ack, "the server leaves TLS to the client")
                try await probe.send(Probe.option(1, Array(test.target.export.utf8)))
                try await probe.expectClosed("the client asked for an export in clear text")
            }
        },
        ConformanceCase(
            "T-11.no-tls",
            "NOTLS",
            "A server without TLS answers STARTTLS with an error, and never asks for TLS."
        ) { test in
            try test.skip(unless: test.target.credentials == nil, "the server has TLS")
            try await test.connect { probe in
                try await probe.greet()
                let answer = try await probe.ask(5).last
                try test.skip(unless: answer?.type != NBDOptionReply.ack, "the server has TLS")
                try test.require(
                    [NBDOptionReply.unsupported, NBDOptionReply.policy, NBDOptionReply.platform].contains(answer?.type),
                    "STARTTLS was answered with \(Probe.name(answer?.type ?? 0))"
                )
                try await probe.expect(7, Probe.goPayload(test.target.export), NBDOptionReply.ack)
            }
        },
        ConformanceCase("T-12.starttls-data", "NBD_OPT_STARTTLS", "STARTTLS with data is ERR_INVALID.") { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                try await probe.expect(5, [1, 2, 3], NBDOptionReply.invalid)
                try await probe.expect(5, [], NBDOptionReply.ack)
            }
        },
        ConformanceCase("T-13.starttls-twice", "NBD_OPT_STARTTLS", "STARTTLS within TLS is ERR_INVALID.") { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(5, [], NBDOptionReply.invalid)
                try await probe.expectAlive()
            }
        },
        ConformanceCase("T-14.state-wipe", "NBD_OPT_STARTTLS", "What was negotiated before TLS is forgotten.") { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                let first = try await probe.ask(8)
                try test.skip(
                    unless: first.last?.type == NBDOptionReply.ack,
                    "the server understands nothing before TLS"
                )
                try await probe.secure()
                try await probe.go()
                let answer = try await probe.perform(0, length: probe.unit)
                try test.require(answer.isSimple, "structured replies survived STARTTLS")
            }
        },
        ConformanceCase("T-15.injection", "NBD_OPT_STARTTLS", "Clear text behind STARTTLS is never understood.") {
            test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.greet()
                try await probe.send(Probe.option(5) + Probe.option(0x7777))
                let answer = try await probe.optionAnswer()
                try test.require(answer.option == 5, "STARTTLS was not answered first")
                do {
                    let bytes = try await probe.channel.withDeadline(.seconds(3), for: "waiting") {
                        try await probe.channel.read(exactly: 8)
                    }
                    let magic = Probe.message { $0.append(NBDWire.optionReplyMagic) }
                    try test.require(bytes != magic, "an option in clear text was answered after STARTTLS")
                } catch is ChannelError {}
            }
        },
        ConformanceCase("T-21.close-notify", "NBD_CMD_DISC", "TLS ends with a close_notify after DISC.") { test in
            try test.skip(unless: test.target.credentials != nil, "needs TLS")
            try await test.connect { probe in
                try await probe.enter()
                try await probe.send(NBDCommand.disconnect.rawValue)
                try await probe.channel.finishWriting()
                do {
                    let buffer = IOBuffer(capacity: 16)
                    let count = try await probe.channel.withDeadline(.seconds(5), for: "closing") {
                        try await probe.channel.readSome(into: buffer.mutable(0..<16))
                    }
                    try test.require(count == 0, "DISC was answered")
                } catch let error as ChannelError {
                    throw ConformanceFailure(
                        text: error.code == .truncated ? "the stream ends without a close_notify" : error.message
                    )
                }
            }
        },
    ]

    static let optionCases: [ConformanceCase] = [
        ConformanceCase("T-30.list", "NBD_OPT_LIST", "LIST ends with an ACK, and names are at most 4096 bytes.") {
            test in
            try await test.connect { probe in
                try await probe.begin()
                let answers = try await probe.ask(3)
                try test.skip(unless: answers.last?.type == NBDOptionReply.ack, "the server does not list its exports")
                for answer in answers.dropLast() {
                    var reader = MessageReader(answer.payload)
                    try test.require(
                        answer.type == NBDOptionReply.server && reader.string() != nil,
                        "an entry is malformed"
                    )
                }
            }
        },
        ConformanceCase("T-30.list-data", "NBD_OPT_LIST", "LIST with data is ERR_INVALID, its data is consumed.") {
            test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(3, [0, 0, 0, 1, 65], NBDOptionReply.invalid, NBDOptionReply.policy)
                try await probe.expectAlive()
            }
        },
        ConformanceCase(
            "T-31.malformed-info",
            "NBD_OPT_INFO",
            "Malformed INFO requests are ERR_INVALID, and the session goes on."
        ) { test in
            let name = test.target.export
            let bad: [[UInt8]] = [
                [], [0], [0, 0, 0, 0], [0, 0, 0, 0, 0, 1], Probe.string(name) + [0, 2, 0, 3],
                Probe.string(name) + [0, 0, 9], [0xff, 0xff, 0xff, 0xff, 0, 0], [0xff, 0xff, 0xff, 0xfa, 0, 0],
                [0, 0, 0x10, 0] + [0, 0],
            ]
            for payload in bad {
                try await test.connect { probe in
                    try await probe.begin()
                    try await probe.expect(6, payload, NBDOptionReply.invalid)
                    try await probe.expectAlive()
                }
            }
        },
        ConformanceCase(
            "T-31.odd-names",
            "NBD_OPT_INFO",
            "Names with NUL, wrong UTF-8 or 4096 bytes are errors, and the session goes on."
        ) { test in
            let names: [[UInt8]] = [
                Array("a\0b".utf8), [0xff, 0xfe, 0xc0], [UInt8](repeating: 65, count: 255),
                [UInt8](repeating: 65, count: 257),
                [UInt8](repeating: 65, count: 4096),
            ]
            try await needsNames(test)
            for name in names {
                try await test.connect { probe in
                    try await probe.begin()
                    let payload = Probe.message {
                        $0.append(UInt32(name.count))
                        $0.append(name)
                        $0.append(UInt16(0))
                    }
                    let answer = try await probe.ask(6, payload).last
                    try test.require(
                        NBDOptionReply.isError(answer?.type ?? 0),
                        "a name of \(name.count) odd bytes was accepted"
                    )
                    try test.require(
                        answer?.payload.count ?? 0 <= 4096,
                        "the error's text is longer than a string may be"
                    )
                    try await probe.expectAlive()
                }
            }
        },
        ConformanceCase("T-31.info-types", "NBD_OPT_INFO", "Unknown and repeated information requests are no error.") {
            test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(
                    6,
                    Probe.goPayload(test.target.export, [0xbeef, 3, 3, 1, 2, 0]),
                    NBDOptionReply.ack
                )
                let many = [UInt16](repeating: 0x7abc, count: 1000)
                let answer = try await probe.ask(6, Probe.goPayload(test.target.export, many)).last
                try test.require(
                    [
                        NBDOptionReply.ack, NBDOptionReply.tooBig, NBDOptionReply.invalid,
                        NBDOptionReply.blockSizeRequired,
                    ].contains(answer?.type),
                    "1000 requests for information were answered with \(Probe.name(answer?.type ?? 0))"
                )
            }
        },
        ConformanceCase(
            "T-32.unknown-export",
            "NBD_OPT_GO",
            "GO to an unknown export is ERR_UNKNOWN, and the next GO works."
        ) { test in
            try await needsNames(test)
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(7, Probe.goPayload("no such export \u{1F937}"), NBDOptionReply.unknown)
                try await probe.expect(6, Probe.goPayload(test.target.export), NBDOptionReply.ack)
                try await probe.go()
                try await probe.expectServing()
            }
        },
        ConformanceCase("T-33.block-size", "Block size constraints", "Block sizes are sane, and sent when asked for.") {
            test in
            try await test.connect { probe in
                try await probe.enter(.simple)
                guard let sizes = probe.blockSizes else {
                    throw ConformanceFailure(text: "the server does not tell its block sizes", isSkip: true)
                }
                try test.require(sizes.isSane, "\(sizes.minimum), \(sizes.preferred), \(sizes.maximum) make no sense")
            }
        },
        ConformanceCase(
            "T-34.export-name",
            "NBD_OPT_EXPORT_NAME",
            "124 zero bytes follow, unless the client wants none."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.go()
                try test.skip(unless: probe.unit == 512, "the export's blocks are too large for this option")
            }
            for flags: UInt32 in [1, 3] {
                try await test.connect { probe in
                    try await probe.greet(flags: flags)
                    if test.target.credentials != nil { try await probe.secure() }
                    try await probe.send(Probe.option(1, Array(test.target.export.utf8)))
                    let reply = try await probe.channel.read(exactly: flags == 3 ? 10 : 134)
                    try test.require(reply[10...].allSatisfy { $0 == 0 }, "the padding is not zero")
                    try await probe.send(0, length: 512)
                    let answer = try await probe.answer(length: 512)
                    try test.require(answer.error == 0 && answer.isSimple, "a read failed, or was answered in chunks")
                }
            }
        },
        ConformanceCase("T-34.unknown-name", "NBD_OPT_EXPORT_NAME", "An unknown name ends the connection.") { test in
            try await needsNames(test)
            try await test.connect { probe in
                try await probe.begin()
                try await probe.send(Probe.option(1, Array("no such export".utf8)))
                try await probe.expectClosed("the client asked for an unknown export")
            }
        },
        ConformanceCase(
            "T-35.needs-structured",
            "NBD_OPT_SET_META_CONTEXT",
            "Without structured replies it is ERR_INVALID."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(
                    10,
                    Probe.contextPayload(test.target.export, ["base:allocation"]),
                    NBDOptionReply.invalid,
                    NBDOptionReply.unsupported
                )
            }
        },
        ConformanceCase(
            "T-35.queries",
            "NBD_OPT_LIST_META_CONTEXT",
            "Queries select by name and namespace; unknown ones nothing."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await structured(probe)
                let name = test.target.export
                let all = try await probe.ask(9, Probe.contextPayload(name, []))
                try test.skip(unless: all.last?.type == NBDOptionReply.ack, "the server has no metadata contexts")
                try test.require(all.count > 1, "a list of all contexts is empty")
                let base = try await probe.expect(9, Probe.contextPayload(name, ["base:"]), NBDOptionReply.ack)
                try test.require(base.count == 2, "'base:' lists \(base.count - 1) contexts")
                let none = try await probe.expect(
                    10,
                    Probe.contextPayload(name, ["x-unknown:thing"]),
                    NBDOptionReply.ack
                )
                try test.require(none.count == 1, "an unknown context was selected")
                let long = String(repeating: "q", count: 4000)
                _ = try await probe.expect(
                    10,
                    Probe.contextPayload(name, [long]),
                    NBDOptionReply.ack,
                    NBDOptionReply.tooBig
                )
            }
        },
        ConformanceCase(
            "T-35.malformed",
            "NBD_OPT_SET_META_CONTEXT",
            "A count of 2^32-1 with little data is ERR_INVALID."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await structured(probe)
                let payload = Probe.string(test.target.export) + [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
                try await probe.expect(10, payload, NBDOptionReply.invalid, NBDOptionReply.unsupported)
                try await probe.expectAlive()
            }
        },
        ConformanceCase(
            "T-35.failure-clears",
            "NBD_OPT_SET_META_CONTEXT",
            "A failed request clears what was selected before."
        ) { test in
            try await test.connect { probe in
                try await probe.begin()
                try await structured(probe)
                let good = try await probe.ask(10, Probe.contextPayload(test.target.export, ["base:allocation"]))
                try test.skip(unless: good.count == 2, "the server has no metadata contexts")
                _ = try await probe.ask(10, [0, 0, 0, 9])
                try await probe.go()
                let answer = try await probe.perform(NBDCommand.blockStatus.rawValue, length: probe.unit)
                try test.require(answer.error == 22, "BLOCK_STATUS was answered with error \(answer.error)")
            }
        },
        ConformanceCase("T-36.structured-data", "NBD_OPT_STRUCTURED_REPLY", "With data it is ERR_INVALID.") { test in
            try await test.connect { probe in
                try await probe.begin()
                try await probe.expect(8, [1], NBDOptionReply.invalid, NBDOptionReply.unsupported)
                try await probe.expectAlive()
            }
        },
        ConformanceCase(
            "T-37.abort",
            "NBD_OPT_ABORT",
            "ABORT, with data as well, is acknowledged and ends the connection."
        ) { test in
            for payload: [UInt8] in [[], [1, 2, 3]] {
                try await test.connect { probe in
                    try await probe.begin()
                    try await probe.expect(2, payload, NBDOptionReply.ack)
                    try await probe.expectClosed("the client sent ABORT")
                }
            }
        },
    ]

    private static func structured(_ probe: ConformanceProbe) async throws {
        guard try await probe.ask(8).last?.type == NBDOptionReply.ack else {
            throw ConformanceFailure(text: "the server has no structured replies", isSkip: true)
        }
        probe.form = .structured
    }

    /// Some servers have one export, whatever it is called.
    private static func needsNames(_ test: ConformanceContext) async throws {
        try await test.connect { probe in
            try await probe.begin()
            let answer = try await probe.ask(6, Probe.goPayload("no such export")).last
            try test.skip(unless: answer?.type != NBDOptionReply.ack, "the server takes any name for its export")
        }
    }
}
