import FuzzTargets
import Glibc

#if FUZZING
    private let target = getenv("FUZZ_TARGET").flatMap { FuzzTarget(rawValue: String(cString: $0)) } ?? .object

    /// libFuzzer's entry; FUZZ_TARGET names the decoder.
    @_cdecl("LLVMFuzzerTestOneInput")
    public func fuzz(_ bytes: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
        target.run(UnsafeRawBufferPointer(start: bytes, count: count))
        return 0
    }

    @_silgen_name("LLVMFuzzerRunDriver")
    func runDriver(
        _ argc: UnsafeMutablePointer<CInt>,
        _ argv: UnsafeMutablePointer<UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?>,
        _ callback: @convention(c) (UnsafePointer<UInt8>?, Int) -> CInt
    ) -> CInt

    /// SwiftPM gives each program's main function the program's name.
    @_cdecl("fuzz_main")
    public func main(_ argc: CInt, _ argv: UnsafeMutablePointer<UnsafeMutablePointer<CChar>?>?) -> CInt {
        var (argc, argv) = (argc, argv)
        return runDriver(&argc, &argv) { fuzz($0, $1) }
    }
#else
    /// Replays inputs: `fuzz TARGET FILE...`.
    @main
    struct Driver {
        static func main() {
            let arguments = CommandLine.arguments
            guard arguments.count > 2, let target = FuzzTarget(rawValue: arguments[1]) else {
                print("usage: fuzz \(FuzzTarget.allCases.map(\.rawValue).joined(separator: "|")) FILE...")
                exit(64)
            }
            for path in arguments.dropFirst(2) {
                guard let file = fopen(path, "r") else { continue }
                var bytes = [UInt8](repeating: 0, count: 1 << 20)
                let count = fread(&bytes, 1, bytes.count, file)
                fclose(file)
                bytes.withUnsafeBytes { target.run(UnsafeRawBufferPointer(rebasing: $0[..<count])) }
            }
        }
    }
#endif
