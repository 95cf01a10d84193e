internal import Emulator
internal import IO

/// The VNC server of a guest of this host, as the guest's own command line names it.
struct LocalDisplay: DisplaySource {
    /// Where it is.
    private struct Place: Sendable {
        var address: SocketAddress
        var process: EmulatorProcess
    }

    let guest: String
    let store: GuestStore
    /// Where records are read.
    let pool: BlockingPool

    func absence() async -> DisplayAbsence? {
        switch await pool.value({ look() }) {
        case .success: nil
        case .failure(let absence): absence
        }
    }

    func open(on loop: EventLoop) async throws(DisplayAbsence) -> DisplayRoute {
        let place = try await pool.value { look() }.get()
        let socket: SocketChannel
        do { socket = try await SocketChannel.connect(to: place.address, on: loop) } catch {
            throw .waiting("the agent cannot connect to the guest's display: \(error)")
        }
        // Who may write where the socket is could show anything, and hear what is typed. Of a port that was seen to before.
        if case .unix(let path) = place.address, !socket.isFrom(process: place.process.pid) {
            socket.close()
            throw .waiting("who listens at \(path) is not the guest's QEMU")
        }
        return DisplayRoute(channel: socket)
    }

    /// Blocks.
    private func look() -> Result<Place, DisplayAbsence> {
        let record: GuestRecord
        do {
            guard let found = try store.load(guest) else {
                return .failure(.never("this host has no guest '\(guest.shown(most: 60))'"))
            }
            record = found
        } catch { return .failure(.waiting("\(error)")) }
        if let released = record.released { return .failure(.moved(to: released.destination)) }
        do {
            let display = try record.commandLine.display()
            guard let process = record.process, process.isRunning, record.isOff != true else {
                return .failure(.waiting("the guest does not run"))
            }
            // Before it belongs to this host its sockets are elsewhere.
            if DurableFile.exists(store.arrivals(of: guest)) {
                return .failure(.waiting("the guest is on its way to this host"))
            }
            switch display {
            case .socket(let path):
                return .success(Place(address: .unix(path: store.socket(path, of: record)), process: process))
            case .ports(let host, let range):
                guard let port = try ListeningPorts.ports(of: process.pid, among: range).first else {
                    let ports = range.count == 1 ? "port \(range.lowerBound)" : "a port from \(range.lowerBound) on"
                    return .failure(.waiting("the guest's QEMU does not listen at \(ports) of loopback"))
                }
                return .success(Place(address: .inet(host: host, port: port), process: process))
            }
        } catch { return .failure(.never("\(error)")) }
    }
}
