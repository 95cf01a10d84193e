import ArgumentParser
import IO
import NBD
import TLS

/// One `--export`.
struct ExportOptions {
    var name: String
    var file: String?
    var format: String?
    var summary = ""
    var isReadOnly = false
    var requiresTLS = false
    var writers: String?
    var readers: String?
    var offset: UInt64 = 0
    var size: UInt64?

    init(name: String, file: String?, format: String?, summary: String) {
        self.name = name
        self.file = file
        self.format = format
        self.summary = summary
    }

    init(parsing text: String) throws {
        self.init(name: "", file: nil, format: nil, summary: "")
        var names = Set<String>()
        let pairs: [String: KeyValue.Value]
        do { pairs = try KeyValue.parse(text, implied: "name") } catch { throw ValidationError("--export: \(error)") }
        for (key, value) in pairs {
            guard case .text(let value) = value else {
                throw ValidationError("Parameter '\(key)' of --export is unexpected")
            }
            names.insert(key)
            switch key {
            case "name": name = value
            case "file": file = value
            case "format": format = value
            case "description": summary = value
            case "read-only": isReadOnly = try Self.flag(key, value)
            case "tls": requiresTLS = try Self.flag(key, value)
            case "authz": writers = value
            case "read-only-authz": readers = value
            case "offset": offset = try Self.bytes(key, value)
            case "size": size = try Self.bytes(key, value)
            default: throw ValidationError("Parameter '\(key)' of --export is unexpected")
            }
        }
        guard names.isSuperset(of: ["name", "file"]) else { throw ValidationError("An --export needs name= and file=") }
        guard name.utf8.count <= 4096, summary.utf8.count <= 4096 else {
            throw ValidationError("The name and the description of an export have at most 4096 bytes")
        }
    }

    private static func flag(_ key: String, _ value: String) throws -> Bool {
        guard ["on", "off"].contains(value) else {
            throw ValidationError("Parameter '\(key)' of --export expects 'on' or 'off', not '\(value)'")
        }
        return value == "on"
    }

    private static func bytes(_ key: String, _ value: String) throws -> UInt64 {
        guard let count = ByteCount(argument: value) else {
            throw ValidationError("Parameter '\(key)' of --export expects a number of bytes, not '\(value)'")
        }
        return count.value
    }

    /// Who may do what with it.
    func authorization(_ objects: ObjectStore) throws -> @Sendable (TLSPeer?) -> ExportAccess {
        let (writers, readers, name) = (writers, readers, name)
        // Whatever is behind it would take.
        let most: ExportAccess = isReadOnly ? .readOnly : .readWrite
        for id in [writers, readers] { if let id { _ = try objects.authorizer(id) } }
        if writers == nil, readers == nil { return { _ in most } }
        return { peer in
            let refusal = "You may not use the export '\(name)'"
            guard let peer else { return .denied("\(refusal) without TLS") }
            func passes(_ id: String?) -> Bool {
                guard let id else { return false }
                return (try? AccessControl(objects: objects, authorization: id).check(peer)) != nil
            }
            if passes(writers) { return most }
            if passes(readers) { return .readOnly }
            return .denied("\(refusal): \(peer.name) is not among those who may")
        }
    }
}
