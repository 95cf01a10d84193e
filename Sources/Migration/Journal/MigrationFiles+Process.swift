public import Emulator
internal import Glibc
internal import IO

extension MigrationFiles {
    /// The process that works on the migration in this role now; nil when there is none.
    public func running(_ role: Role) -> EmulatorProcess? {
        guard let bytes = (try? DurableFile.read(process(role))) ?? nil,
            let found = JSONText.decode(EmulatorProcess.self, from: bytes), found.isRunning
        else { return nil }
        return found
    }

    /// Names this process as the one that works on the migration in this role.
    public func enter(_ role: Role) {
        guard let own = EmulatorProcess(pid: getpid()) else { return }
        try? DurableFile.write(try JSONText.encode(own), to: process(role))
    }

    /// Nobody works on the migration in this role any more.
    public func leave(_ role: Role) { unlink(process(role)) }
}
