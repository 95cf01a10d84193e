internal import CLinux
internal import Emulator
internal import Glibc
internal import IO

/// What a host has to give: room, memory, processors, a clock.
extension HostExamination {
    /// Below this a file system is full for all practical purposes.
    private static let leastSpace: UInt64 = 256 << 20
    /// QEMU itself takes so much beside its guest.
    private static let leastMemory: UInt64 = 128 << 20
    /// A disk that writes less in a second makes every copy wait.
    private static let leastRate = 20.0 * 1_048_576

    func space() -> [Finding] {
        let place = existing(imageDirectory)
        guard access(place, W_OK) == 0 else {
            return [
                Finding(
                    .space,
                    .fail,
                    here: imageDirectory,
                    message: "\(place) cannot be written: \(String(cString: strerror(errno)))",
                    remedy: "run this as the user that the agent runs as, or name another --image-dir"
                )
            ]
        }
        let free = xd_free_bytes(place)
        let text = "\(ByteSize.text(free & ~((1 << 20) - 1))) free"
        if free < Self.leastSpace {
            return [
                Finding(
                    .space,
                    .fail,
                    here: text,
                    message: "The file system of \(imageDirectory) is full",
                    remedy: "make room, or name another --image-dir in /etc/crossdock/destination"
                )
            ]
        }
        if xd_is_memory_file_system(place) == 1 {
            return [
                Finding(
                    .space,
                    .warn,
                    here: text,
                    message: "\(imageDirectory) is in memory (tmpfs): images of guests are lost with the host",
                    remedy: "name another --image-dir in /etc/crossdock/destination"
                )
            ]
        }
        return [Finding(.space, .ok, here: text)]
    }

    /// The directory, or the nearest one above it that is there.
    private func existing(_ path: String) -> String {
        var path = path
        while !DurableFile.exists(path), let slash = path.lastIndex(of: "/"), slash > path.startIndex {
            path = String(path[..<slash])
        }
        return DurableFile.exists(path) ? path : "/"
    }

    func diskRate() -> [Finding] {
        guard measuresDisk else { return [] }
        do {
            let rate = try DiskRate.measure(in: existing(imageDirectory))
            let text = "\(Int(rate) >> 20) MiB/s"
            guard rate < Self.leastRate else { return [Finding(.diskRate, .ok, here: text)] }
            return [
                Finding(
                    .diskRate,
                    .warn,
                    here: text,
                    message: "The file system of \(imageDirectory) writes \(text)",
                    remedy: "look for what else uses the disk, and name a faster --image-dir"
                )
            ]
        } catch {
            return [Finding(.diskRate, .warn, here: "not known", message: "\(error)", remedy: "make room")]
        }
    }

    func memory() -> [Finding] {
        let text = String(decoding: ((try? DurableFile.read("\(processes)/meminfo")) ?? nil) ?? [], as: UTF8.self)
        let line = text.split(separator: "\n").first { $0.hasPrefix("MemAvailable:") }
        let free = (line?.split(separator: " ").dropFirst().first.flatMap { UInt64($0) } ?? 0) << 10
        return [
            Finding(
                .memory,
                free < Self.leastMemory ? .fail : .ok,
                here: "\(ByteSize.text(free & ~((1 << 20) - 1))) available",
                message: free < Self.leastMemory ? "There is no memory for another QEMU" : nil,
                remedy: free < Self.leastMemory ? "stop what is not needed, or move guests elsewhere" : nil
            )
        ]
    }

    func confinement() -> [Finding] {
        // What is inside them the agent opens itself.
        let isInside = imageDirectory.hasPrefix("\(stateDirectory)/")
        var missing = ConfinementPolicy.missing(for: isInside ? [stateDirectory] : [stateDirectory, imageDirectory])
        missing +=
            BusConnection.isThere ? [] : ["There is no system D-Bus: guests get no scope of their own in systemd"]
        guard missing.isEmpty else {
            return [
                Finding(
                    .confinement,
                    .warn,
                    here: "in part",
                    message: missing.joined(separator: "; "),
                    remedy: "docs/security.md says what each part needs; --require-confinement insists on it"
                )
            ]
        }
        return [Finding(.confinement, .ok, here: "whole")]
    }

    func kernel() -> [Finding] {
        var findings: [Finding] = []
        let kvm = "\(devices)/kvm"
        if access(kvm, R_OK | W_OK) != 0 {
            let isThere = DurableFile.exists(kvm)
            findings.append(
                Finding(
                    .kernel,
                    .warn,
                    here: isThere ? "no access" : "no KVM",
                    message: isThere
                        ? "\(kvm) cannot be opened: \(String(cString: strerror(errno)))"
                        : "There is no \(kvm): guests that need KVM cannot run here",
                    remedy: isThere
                        ? "add the user to the group kvm" : "switch virtualisation on in the firmware, modprobe kvm"
                )
            )
        }
        var limit = rlimit()
        getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
        if limit.rlim_max < 4096 {
            findings.append(
                Finding(
                    .kernel,
                    .warn,
                    here: "\(limit.rlim_max) files",
                    message: "A process may have \(limit.rlim_max) files open, and an agent needs some for each guest",
                    remedy: "LimitNOFILE= in the unit, or ulimit -n"
                )
            )
        }
        return findings.isEmpty ? [Finding(.kernel, .ok, here: "KVM")] : findings
    }

    func clock() -> [Finding] {
        let isKept = xd_clock_is_synchronised() == 1
        return [
            Finding(
                .clock,
                isKept ? .ok : .warn,
                here: isKept ? "synchronised" : "free running",
                message: isKept ? nil : "Nothing keeps the clock right: guests and certificates notice when it is off",
                remedy: isKept ? nil : "timedatectl set-ntp true"
            )
        ]
    }
}

/// Whether the system's message bus is there.
private enum BusConnection {
    static var isThere: Bool { DurableFile.exists("/run/dbus/system_bus_socket") }
}
