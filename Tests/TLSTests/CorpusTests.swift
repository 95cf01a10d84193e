import FuzzTargets
import Glibc
import IO
import TestSupport
import Testing

/// What the fuzzers began with and found is replayed with each run of the tests.
struct CorpusTests {
    static let root: String = {
        // Tests/TLSTests/CorpusTests.swift
        "/" + #filePath.split(separator: "/").dropLast(3).joined(separator: "/") + "/Fuzz/Corpus"
    }()

    @Test(arguments: FuzzTarget.allCases)
    func everyInputOfTheCorpusIsSurvived(_ target: FuzzTarget) throws {
        let directory = "\(Self.root)/\(target.rawValue)"
        let names = DurableFile.list(directory)
        #expect(!names.isEmpty)
        for name in names {
            let input = try #require(try DurableFile.read("\(directory)/\(name)"))
            input.withUnsafeBytes { target.run($0) }
            // Cut off anywhere, it is survived as well.
            for count in stride(from: 0, to: input.count, by: max(1, input.count / 16)) {
                input.withUnsafeBytes { target.run(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
            }
        }
    }
}
