import IO
import TestSupport
import Testing

@testable import Web

/// The files of the page are those of its directory.
@Suite(.timeLimit(.minutes(1)))
struct PageFileTests {
    private let directory: String = {
        let parts = #filePath.split(separator: "/").dropLast(3)
        return "/" + parts.joined(separator: "/") + "/Sources/Web/Page"
    }()

    @Test func everyFileIsCompiledInAsItIs() throws {
        let names = Set(DurableFile.list(directory).filter { !$0.hasPrefix(".") })
        let known = Set(PageFile.all.keys)
        #expect(names.subtracting(known) == [], "add them to Sources/CWebPage/CWebPage.c")
        #expect(known.subtracting(names) == [], "remove them from Sources/CWebPage/CWebPage.c")
        for (name, file) in PageFile.all {
            #expect(try DurableFile.read("\(directory)/\(name)") == file.bytes, "\(name)")
            #expect(file.type != "application/octet-stream", "\(name) has no MIME type")
        }
    }
}
