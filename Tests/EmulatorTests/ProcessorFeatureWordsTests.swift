import Glibc
import IO
import TestSupport
import Testing

@testable import Emulator

/// What one answer tells of a processor is what each of its properties says.
struct ProcessorFeatureWordsTests {
    private static let repository = #filePath.split(separator: "/").dropLast(3).reduce("") { "\($0)/\($1)" }

    @Test(arguments: ["7.2", "10.0"])
    func aProcessorsFeatureWordsTellWhatItsPropertiesSay(_ version: String) async throws {
        let models = [
            "qemu64", "max", "kvm64", "Skylake-Server,-xsaves", "EPYC-Milan,+perfctr-nb", "Nehalem,+vmx",
            "max,-vmx,-svm",
        ]
        let directory = try TestDirectory()
        let loop = EventLoop(name: "test")
        defer { loop.stop() }
        for (index, model) in models.enumerated() {
            let socket = directory.file("qmp\(index)")
            let emulator = try ChildProcess([
                "\(Self.repository)/deploy/qemu", version, "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-cpu",
                model,
                "-S", "-nodefaults", "-display", "none", "-qmp", "unix:\(socket),server=on,wait=off",
            ])
            try await emulator.wait(for: "a monitor") { isListening(socket) }
            try await loop.run {
                let monitor = try await QMPClient.connect(to: socket, on: loop)
                defer { monitor.close() }
                let path = try #require(try await monitor.firstProcessor())
                let names = try await monitor.members(of: path).filter { $0.type == "bool" }.map(\.name)
                let words = try #require(try await monitor.property("feature-words", of: path))
                let told = ProcessorFeatureWords.read(names, from: words)
                let said = try await monitor.properties(names, of: path)
                for (name, value) in told { #expect(said[name] == value, "\(model): \(name)") }
                #expect(told.count > 200 && told.values.contains(true), "\(model): \(told.count) of \(names.count)")
                let both = try await monitor.processorProperties(names, of: path)
                #expect(both == said, "\(model)")
            }
            emulator.signal(SIGKILL)
        }
    }
}
