import Glibc
import IO
import Migration

/// Where a report is to be written, looked at before anything is done that would be reported.
struct ReportFile {
    private let path: String

    /// Looks at the place.
    ///
    /// - Throws: `FileError` when it could not be written there.
    init(_ name: String) throws {
        path = DurableFile.resolve(name, in: currentDirectory)
        let parent = path.split(separator: "/").dropLast().reduce("") { "\($0)/\($1)" }
        var status = stat()
        guard stat(parent.isEmpty ? "/" : parent, &status) == 0, status.st_mode & S_IFMT == S_IFDIR else {
            throw FileError(
                "There is no directory \(parent) for the report; make it, or name another place with --report"
            )
        }
        if stat(path, &status) == 0, status.st_mode & S_IFMT == S_IFDIR {
            throw FileError("\(path) is a directory; --report takes the name of a file")
        }
        guard access(parent.isEmpty ? "/" : parent, W_OK | X_OK) == 0 else {
            throw FileError.system("write a report in the directory \(parent)", errno)
        }
    }

    /// Writes a report.
    func write(_ report: MigrationReport) throws { try DurableFile.write(Array(report.json.utf8), to: path) }
}
