extension GuestCommandLine {
    /// What a blank copy of a guest needs to know.
    public struct ShadowMaterial: Sendable {
        /// The bytes of block nodes and drives by name, and of files by path.
        public var sizes: [String: UInt64]
        /// The guest's memory at its start, in bytes.
        public var memory: UInt64
        /// The name of the machine's memory object.
        public var memoryID: String?

        /// Makes a description.
        public init(sizes: [String: UInt64], memory: UInt64, memoryID: String?) {
            self.sizes = sizes
            self.memory = memory
            self.memoryID = memoryID
        }
    }

    /// The same machine with nothing in it: no disk, file, socket, network or process of the guest is touched by it.
    ///
    /// Disks and flash are null nodes of the same size, firmware files are empty files of the same size, character devices go
    /// nowhere, networks are isolated, memory is a file that is never written and need not be sent. What each option becomes stands
    /// in its rule.
    ///
    /// - Parameters:
    ///   - material: sizes and memory.
    ///   - memory: the directory in which QEMU makes the files of the memory.
    ///   - scratch: makes an empty file of so many bytes and returns its path.
    /// - Throws: `GuestError` for what is no command line, and what `scratch` throws.
    public func shadow(
        _ material: ShadowMaterial,
        memory: String,
        scratch: (UInt64) throws -> String
    ) throws -> GuestCommandLine {
        try withoutActuallyEscaping(scratch) { scratch in
            var copy = BlankCopy(material, memory: memory, scratch: scratch)
            for option in try options() { try copy.add(option) }
            try copy.finish()
            return GuestCommandLine(program: program, options: copy.options, directory: directory)
        }
    }
}
