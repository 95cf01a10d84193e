import ArgumentParser
import FoundationEssentials
import IO
import Migration
import NBD
import TLS

struct NBDInfoCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "info",
        abstract: "Tells about the exports of an NBD server: nbdinfo's job.",
        discussion: """
              crossdock nbd info nbds://host/web1
              crossdock nbd info --map nbds://host/web1
              crossdock nbd info --map=qemu:allocation-depth --totals nbds://host/web1
              crossdock nbd info --can trim nbds://host/web1 && echo yes

              crossdock nbd info -- [ nbdkit memory 1G ]

            A command in brackets is a server that is started for this, with a socket to listen on. --can and --is end with 0 for yes and 2 \
            for no, --cannot and --isnt the other way round. --digest reads the whole disk and prints the digest that migrations compare.
            """
    )

    enum Ability: String, ExpressibleByArgument, CaseIterable {
        case cache, connect, df, extents, fua, flush, multiConn = "multi-conn", read, trim, write, zero
        case fastZero = "fast-zero"
        case structuredReply = "structured-reply"
        case extendedHeaders = "extended-headers"
        case blockStatusPayload = "block-status-payload"
        case readOnly = "read-only"
        case rotational, tls

        /// nbdinfo takes the names with an underscore as well.
        init?(argument: String) { self.init(rawValue: argument.replacing("_", with: "-")) }
    }

    @OptionGroup var security: NBDClientSecurity

    @Flag(help: "Print JSON.")
    var json = false
    @Flag(name: [.customShort("L"), .long], help: "List all exports.")
    var list = false
    @Flag(help: "Print the size in bytes only.")
    var size = false
    @Flag(name: .customLong("uri"), help: "Print the URI only; with --list that of each export.")
    var showsURI = false
    @Flag(help: "Print what the disk consists of.")
    var map = false
    @Option(help: ArgumentHelp("The metadata context for --map.", valueName: "name"))
    var context = MetaContext.allocation
    @Flag(name: [.customLong("totals"), .customLong("total")], help: "With --map: only the sums.")
    var totals = false
    @Option(
        name: [.customLong("can"), .customLong("has"), .customLong("is")],
        help: "Answer whether the server can do something."
    )
    var can: Ability?
    @Option(
        name: [.customLong("cannot"), .customLong("hasnt"), .customLong("isnt")],
        help: "Answer whether the server can not."
    )
    var cannot: Ability?
    @Flag(help: .hidden)
    var content = false
    @Flag(name: [.customLong("no-content")], help: .hidden)
    var noContent = false
    @Flag(
        name: [.customLong("color"), .customLong("colour"), .customLong("no-color"), .customLong("no-colour")],
        help: .hidden
    )
    var color = false
    @Flag(name: [.customShort("V")], help: .hidden)
    var showsVersion = false
    @Flag(help: "Print the disk's digest.")
    var digest = false
    @Argument(help: "The NBD URI.")
    var uri: String

    func validate() throws {
        if showsVersion { throw CleanExit.message(Crossdock.configuration.version) }
        if content {
            throw ValidationError(
                "--content looks into the disk with file(1): 'nbdcopy URI - | head -c 64K | file -' does that"
            )
        }
        guard [list && !showsURI, showsURI, size, map, can != nil, cannot != nil, digest].filter({ $0 }).count <= 1
        else {
            throw ValidationError("Give at most one of --list, --uri, --size, --map, --can, --cannot and --digest.")
        }
        guard map || !totals && context == MetaContext.allocation else {
            throw ValidationError("--totals and --context go with --map.")
        }
    }

    func run() async throws {
        try await failing {
            let uri = try NBDURI(parsing: uri)
            if map {
                try await showMap(uri)
            } else if digest {
                try await showDigest(uri)
            } else {
                let server = try await examine(uri)
                if let ability = can ?? cannot {
                    let answer = server.can(ability)
                    if json { output("{\"\(ability.rawValue)\": \(answer)}\n") }
                    throw ExitCode(answer == (can != nil) ? 0 : 2)
                }
                if showsURI {
                    output(json ? server.urisJSON(uri, isList: list) : server.uris(uri))
                } else if size {
                    output(json ? "{\"size\": \(server.exports[0].info.size)}\n" : "\(server.exports[0].info.size)\n")
                } else {
                    output(json ? server.json(uri) : server.text(uri))
                }
            }
        }
    }

    /// Looks at one export, or at all of them, without using any.
    private func examine(_ uri: NBDURI) async throws -> NBDServerReport {
        let options = try security.options(uri)
        return try await onClientLoop { loop in
            let channel = try await SocketChannel.connect(to: uri.address, on: loop)
            let negotiation = try await NBDNegotiation.start(over: channel, options)
            var wanted = [(name: uri.export, summary: "")]
            if list { wanted = try await negotiation.list().map { ($0.name, $0.summary) } }
            var exports: [NBDServerReport.Export] = []
            for (name, summary) in wanted {
                var info = try await negotiation.info(name)
                // Some servers describe their exports in the list only; where both say something, nbdinfo tells what the list says.
                if !summary.isEmpty { info.summary = summary }
                let contexts = try await negotiation.listContexts(name)
                exports.append(.init(requested: name, info: info, contexts: contexts))
            }
            let report = NBDServerReport(
                form: negotiation.form,
                tls: negotiation.tls.map { ($0.version, $0.cipher) },
                exports: exports
            )
            await negotiation.abort()
            return report
        }
    }

    private func open(_ uri: NBDURI, _ loops: EventLoopGroup, contexts: [String] = [])
        async throws -> ClientBackEnd
    {
        try await ClientBackEnd.open(
            uri.address,
            security.options(uri, contexts: contexts),
            connections: nil,
            loops: loops
        )
    }

    private func showMap(_ uri: NBDURI) async throws {
        let loops = EventLoopGroup(count: 1, name: "nbd")
        let export = try await open(uri, loops, contexts: [context])
        guard export.traits.contexts.contains(context) else {
            throw ChannelError(
                .protocolViolation,
                "The NBD server has no metadata context '\(context)' for this export"
            )
        }
        var extents: [Extent] = []
        var position: UInt64 = 0
        while position < export.size {
            let found = try await export.extents(
                of: context,
                at: position,
                count: export.size - position,
                limit: 1 << 20
            )
            guard !found.isEmpty else { throw ChannelError(.protocolViolation, "The NBD server tells nothing more") }
            for extent in found {
                position += extent.length
                if let last = extents.last, last.flags == extent.flags {
                    extents[extents.count - 1].length += extent.length
                } else {
                    extents.append(extent)
                }
            }
        }
        await export.close()
        let map = NBDMapReport(context: context, extents: extents, size: export.size)
        output(totals ? (json ? map.totalsJSON() : map.totals()) : (json ? map.json() : map.text()))
    }

    private func showDigest(_ uri: NBDURI) async throws {
        let loops = EventLoopGroup(name: "nbd")
        let export = try await open(uri, loops)
        let digest = try await export.loops[0].run { try await ChunkDigests.digest(of: export) }
        await export.close()
        output(json ? "{\"digest\": \"\(digest)\"}\n" : "\(digest)\n")
    }
}
