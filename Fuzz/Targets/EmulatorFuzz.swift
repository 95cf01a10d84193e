internal import Emulator
internal import IO
internal import TestSupport

/// What comes from a QEMU that may be anything.
enum EmulatorFuzz {
    private static let loop = EventLoop(name: "fuzz-qmp")
    private static let greeting =
        Array(#"{"QMP":{"version":{"qemu":{"major":7,"minor":2}},"capabilities":["oob"]}}"#.utf8) + [10]

    /// A whole conversation: the inspection of a guest whose monitor answers what the input says.
    ///
    /// The first byte chooses: the input is sent as it is, or each of its lines is the answer to the next command.
    static func monitor(_ input: [UInt8]) {
        guard let first = input.first else { return }
        let done = Gate()
        let loop = loop
        Task(executorPreference: loop) {
            let (near, far) = MemoryChannel.pair(on: loop, capacity: input.count + 65536)
            let peer = Task(executorPreference: loop) {
                if first & 1 == 0 {
                    try await far.write(Array(input.dropFirst()))
                } else {
                    try await far.write(greeting)
                    let answers = input.dropFirst().split(separator: 10, omittingEmptySubsequences: false)
                    let questions = LineReader(far, limit: 1 << 20)
                    var index = 0
                    while let question = try await questions.next() {
                        let id = (try? JSONValue(parsing: question))?["id"]?.string ?? ""
                        guard index < answers.count else { break }
                        // An answer that begins with "!" is an error, anything else a return value.
                        let body = Array(answers[index])
                        index += 1
                        let text =
                            body.first == UInt8(ascii: "!")
                            ? Array(#"{"error":{"class":"GenericError","desc":"no"},"id":"\#(id)"}"#.utf8)
                            : Array(#"{"id":"\#(id)","return":"#.utf8) + body + [UInt8(ascii: "}")]
                        try await far.write(text + [10])
                    }
                }
                far.close()
            }
            if let client = try? await QMPClient.connect(over: near, timeout: .milliseconds(200)) {
                let line = GuestCommandLine(
                    arguments: ["qemu-system-x86_64", "-device", "virtio-blk-pci,drive=d,id=a", "-cpu", "max"],
                    directory: "/nonexistent"
                )
                _ = try? await GuestInspection.inspect(client, line, nil)
                _ = try? await MachineFingerprint(of: client)
                client.close()
            }
            near.close()
            _ = await peer.result
            done.open()
        }
        done.wait()
    }

    static func commandLine(_ text: String) {
        let words = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
        let line = GuestCommandLine(arguments: ["qemu-system-x86_64"] + words, directory: "/nonexistent")
        _ = try? line.paths()
        _ = try? line.pinned(machine: "pc-i440fx-7.2")
        _ = try? line.endpoints()
        _ = try? line.bridges()
        for format in [nil, "raw", "qcow2"] {
            guard
                let moved = try? line.relocated({ reference in
                    var placement = GuestCommandLine.Placement(path: "/images/\(reference.path.count)", format: format)
                    placement.isFlattened = true
                    placement.size = 4096
                    return placement
                })
            else { continue }
            let there = GuestCommandLine(arguments: moved.arguments, directory: "/nonexistent")
            // What was rewritten once can be read again.
            precondition((try? there.paths()) != nil, "a rewritten command line cannot be read")
            let blank = GuestCommandLine.ShadowMaterial(sizes: [:], memory: 1 << 20, memoryID: "pc.ram")
            _ = try? there.shadow(blank, memory: "/tmp") { "/scratch/\($0)" }
        }
    }
}
