internal import Glibc
internal import IO

/// The files that a program of this host consists of, found from the program: its loader, libraries, and the data of QEMU.
struct ProgramFiles {
    /// Where QEMU's data is, below a prefix: `/usr`, or that of the program.
    private static let data = [
        "share/qemu", "share/qemu-kvm", "share/qemu-firmware", "share/seabios", "share/seavgabios", "share/sgabios",
        "share/vgabios", "share/ipxe", "share/OVMF", "share/ovmf", "share/AAVMF", "share/qemu-efi-aarch64",
        "share/qemu-efi-riscv64", "share/edk2", "share/edk2-ovmf", "share/opensbi", "share/slof", "lib/ipxe/qemu",
        "lib/qemu", "lib64/qemu", "lib64/qemu-kvm",
    ]
    private static let libraries = [
        "/lib", "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/local/lib64",
    ]

    /// The program's own path.
    let path: String
    /// What it takes to run it.
    let rules: [Confinement.Rule]

    /// Finds the files of a program.
    ///
    /// - Parameters:
    ///   - program: its name, looked up in PATH, or its path. A script is taken with its interpreter and the QEMU that it names.
    ///   - withData: whether it reads QEMU's firmware and modules.
    /// - Throws: `GuestError` when it is not installed.
    init(_ program: String, withData: Bool) throws {
        try self.init(program, withData: withData, depth: 0)
    }

    private init(_ program: String, withData: Bool, depth: Int) throws {
        guard let found = EmulatorProcess.find(program) else {
            throw GuestError("The program '\(program)' is not installed on this host")
        }
        path = found
        var rules = [Confinement.Rule(found, [.read, .execute])]
        let real = DurableFile.resolve(found, in: "/")
        let head = Self.head(of: real)
        if head.starts(with: "#!".utf8), depth < 3 {
            for name in Self.programs(ofScript: head) {
                rules += try ProgramFiles(name, withData: withData, depth: depth + 1).rules
            }
        } else {
            let parts = ExecutableFile(real)
            if let loader = parts?.loader { rules.append(.init(loader, [.read, .execute], isOptional: true)) }
            let directories = Self.libraryDirectories + (parts?.libraryDirectories ?? [])
            rules += Set(directories).sorted().map { .init($0, .reading, isOptional: true) }
        }
        if withData { rules += Self.dataDirectories(of: real).map { .init($0, .reading, isOptional: true) } }
        self.rules = rules
    }

    private static func head(of path: String) -> [UInt8] {
        let descriptor = open(path, O_RDONLY | O_CLOEXEC)
        guard descriptor >= 0 else { return [] }
        defer { close(descriptor) }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = read(descriptor, &bytes, bytes.count)
        return Array(bytes.prefix(max(count, 0)))
    }

    /// The interpreter of a script, and the QEMU that it hands over to: Debian's `kvm` is one.
    private static func programs(ofScript bytes: [UInt8]) -> [String] {
        let text = String(decoding: bytes, as: UTF8.self)
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        let interpreter = lines.first?.dropFirst(2).split(separator: " ").first.map(String.init)
        let words = lines.dropFirst().flatMap { $0.split { " \t\"'".contains($0) } }.map(String.init)
        let emulators = words.filter {
            RunningEmulator.isEmulatorName($0.split(separator: "/").last.map(String.init) ?? "")
                && EmulatorProcess.find($0) != nil
        }
        return [interpreter].compactMap { $0 } + Set(emulators).sorted()
    }

    /// Where the loader looks for libraries.
    private static let libraryDirectories: [String] = {
        var found = libraries
        for name in DurableFile.list("/etc/ld.so.conf.d") {
            let bytes = (try? DurableFile.read("/etc/ld.so.conf.d/\(name)")) ?? nil
            let lines = String(decoding: bytes ?? [], as: UTF8.self).split(separator: "\n")
            found += lines.map(\.trimmed).filter { $0.hasPrefix("/") }
        }
        return found
    }()

    /// QEMU looks for its data where it was built to be, and beside its program when that was moved.
    private static func dataDirectories(of program: String) -> [String] {
        let parts = program.split(separator: "/").dropLast(2)
        let own = parts.reduce("") { "\($0)/\($1)" }
        return Set(["/usr", "/usr/local", own]).sorted().flatMap { prefix in data.map { "\(prefix)/\($0)" } }
            + ["/etc/qemu"]
    }
}
