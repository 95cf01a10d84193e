import ArgumentParser
import Fleet
import Glibc
import IO
import Migration
import Source
import TLS

/// What a pairing has this host do: an order on standard input, its answer on standard output.
struct PairMemberCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "pair-member",
        abstract: "Carries out an order of 'crossdock pair' on this host.",
        shouldDisplay: false
    )

    @OptionGroup var common: CommonOptions

    func run() async throws {
        var answer = MemberAnswer()
        do {
            guard let order = JSONText.decode(MemberOrder.self, from: try await Self.input()) else {
                throw FleetError("the order is of another release")
            }
            answer = try await carryOut(order)
        } catch { answer.failure = "\(error)" }
        output(String(decoding: try JSONText.encode(answer), as: UTF8.self) + "\n")
    }

    private func carryOut(_ order: MemberOrder) async throws -> MemberAnswer {
        if case .bring(let list, let address) = order { return try await bring(list, to: address) }
        guard case .prove(let address) = order else {
            let host = MemberHost(
                files: FleetFiles(),
                stateDirectory: common.stateDirectory,
                version: Crossdock.number
            )
            return try await BlockingPool.shared.run { try host.carryOut(order) }
        }
        // The credentials that every command finds by itself.
        var look = Doctor.Order(
            host: HostExamination(stateDirectory: common.stateDirectory),
            credentials: CredentialSelection()
        )
        look.target = try EvacuationOrder.Target(parsing: address)
        var answer = MemberAnswer()
        answer.findings = await Doctor.examine(look) { _ in }
        return answer
    }

    private func bring(_ list: SignedFleetList, to address: String) async throws -> MemberAnswer {
        let target = try EvacuationOrder.Target(parsing: address)
        let selection = CredentialSelection()
        let credentials = try selection.credentials(.client, from: selection.store(), user: "the pairing")
        let loop = EventLoop(name: "pairing")
        defer { loop.stop() }
        let host = TargetHost(
            host: target.host,
            port: target.port,
            evacuation: MigrationStore.makeID(),
            credentials: credentials,
            on: loop
        )
        defer { host.close() }
        guard try await host.bring(.init(list: list.list, signature: list.signature)) else {
            throw FleetError("the agent of \(address) is of an earlier release")
        }
        return MemberAnswer()
    }

    private static func input() async throws -> [UInt8] {
        try await BlockingPool.shared.run {
            var bytes: [UInt8] = []
            var piece = [UInt8](repeating: 0, count: 64 << 10)
            while true {
                let count = read(0, &piece, piece.count)
                if count < 0, errno == EINTR { continue }
                guard count > 0 else { return bytes }
                bytes += piece[..<count]
                guard bytes.count <= 16 << 20 else { throw FleetError("the order is larger than 16 MiB") }
            }
        }
    }
}
