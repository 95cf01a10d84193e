internal import IO

/// The command line of a blank copy while it is put together.
public struct BlankCopy {
    /// What it has so far.
    var options: [GuestOption] = []
    /// How many networks are alone by themselves.
    var hubs = 0
    var hasMemory = false
    var hasSpice = false
    private let material: GuestCommandLine.ShadowMaterial
    private let directory: String
    /// Makes an empty file of so many bytes and returns its path.
    let scratch: (UInt64) throws -> String

    init(
        _ material: GuestCommandLine.ShadowMaterial,
        memory directory: String,
        scratch: @escaping (UInt64) throws -> String
    ) {
        self.material = material
        self.directory = directory
        self.scratch = scratch
    }

    /// The bytes of what is known by the first of these names that is.
    func size(_ names: String?...) -> UInt64 {
        for name in names { if let name, let size = material.sizes[name] { return size } }
        return 1 << 20
    }

    /// Adds a drive of so many bytes with nothing in it.
    mutating func addDrive(of size: UInt64, form: String) {
        options.append(
            GuestOption("drive", (form.isEmpty ? "" : "\(form),") + "driver=null-co,size=\(size),read-zeroes=on")
        )
    }

    /// Adds memory that is never written.
    mutating func addMemory(_ id: String, _ size: String) {
        options.append(
            GuestOption(
                "object",
                "memory-backend-file,id=\(KeyValue.escape(id)),size=\(KeyValue.escape(size)),share=on,"
                    + "mem-path=\(KeyValue.escape(directory))"
            )
        )
    }

    mutating func add(_ option: GuestOption) throws {
        let parsed = try ParsedOption(ofOriginal: option)
        switch parsed.rule.blank {
        case .kept: options.append(parsed.written)
        case .leftOut: break
        case .emptied(let empty): try empty(&self, parsed)
        }
    }

    /// Adds what depends on all the rest.
    mutating func finish() throws {
        if hasSpice {
            // Its devices do not exist without it.
            let socket = KeyValue.escape(try scratch(0))
            options.append(GuestOption("spice", "unix=on,disable-ticketing=on,addr=\(socket).spice"))
        }
        if !hasMemory, let id = material.memoryID, material.memory > 0 {
            addMemory(id, "\(material.memory)")
            // Merged with the machine's other properties.
            options.append(GuestOption("machine", "memory-backend=\(KeyValue.escape(id))"))
        }
        options.append(GuestOption("display", "none"))
    }
}
