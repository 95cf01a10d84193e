// swift-tools-version: 6.2
import PackageDescription

let settings: [SwiftSetting] = [
    .enableUpcomingFeature("ExistentialAny"),
    .enableUpcomingFeature("InternalImportsByDefault"),
    .enableUpcomingFeature("MemberImportVisibility"),
    .enableUpcomingFeature("NonisolatedNonsendingByDefault"),
    .treatAllWarnings(as: .error),
]

let package = Package(
    name: "crossdock",
    products: [
        .executable(name: "crossdock", targets: ["crossdock"]),
        .library(name: "CrossdockIO", targets: ["IO"]),
        .library(name: "CrossdockTLS", targets: ["TLS"]),
        .library(name: "CrossdockNBD", targets: ["NBD"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.2")
    ],
    targets: [
        .systemLibrary(name: "CGnuTLS", pkgConfig: "gnutls", providers: [.apt(["libgnutls28-dev"])]),
        .systemLibrary(name: "CGcrypt", pkgConfig: "libgcrypt", providers: [.apt(["libgcrypt20-dev"])]),
        .systemLibrary(name: "CXXHash", pkgConfig: "libxxhash", providers: [.apt(["libxxhash-dev"])]),
        .systemLibrary(name: "CZstd", pkgConfig: "libzstd", providers: [.apt(["libzstd-dev"])]),
        .systemLibrary(name: "CSSH", pkgConfig: "libssh", providers: [.apt(["libssh-dev"])]),
        .target(name: "CLinux"),
        .target(name: "CSHA256"),
        .target(name: "CWebPage"),
        .target(name: "IO", dependencies: ["CLinux", "CGcrypt", "CSSH", "CZstd"], swiftSettings: settings),
        .target(name: "TLS", dependencies: ["IO", "CGnuTLS", "CGcrypt", "CLinux", "CSHA256"], swiftSettings: settings),
        .target(name: "NBD", dependencies: ["TLS", "IO", "CLinux"], swiftSettings: settings),
        .target(name: "Emulator", dependencies: ["TLS", "IO", "CLinux"], swiftSettings: settings),
        .target(
            name: "Migration",
            dependencies: ["NBD", "Emulator", "TLS", "IO", "CLinux", "CXXHash"],
            swiftSettings: settings
        ),
        .target(
            name: "Source",
            dependencies: ["Migration", "NBD", "Emulator", "TLS", "IO", "CLinux"],
            swiftSettings: settings
        ),
        .target(
            name: "Destination",
            dependencies: ["Migration", "NBD", "Emulator", "TLS", "IO", "CLinux"],
            swiftSettings: settings
        ),
        .target(
            name: "Fleet",
            dependencies: ["Migration", "TLS", "IO", "CLinux", "CSSH"],
            swiftSettings: settings
        ),
        .target(
            name: "Web",
            dependencies: ["Source", "Migration", "Emulator", "TLS", "IO", "CLinux", "CWebPage"],
            exclude: ["Page"],
            swiftSettings: settings
        ),
        .executableTarget(
            name: "crossdock",
            dependencies: [
                "Source", "Destination", "Fleet", "Web", "Migration", "NBD", "Emulator", "TLS", "IO", "CLinux",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ],
            swiftSettings: settings
        ),
        .target(
            name: "FuzzTargets",
            dependencies: ["Web", "Destination", "Migration", "Emulator", "NBD", "TLS", "IO", "TestSupport"],
            path: "Fuzz/Targets",
            swiftSettings: settings
        ),
        .executableTarget(name: "fuzz", dependencies: ["FuzzTargets"], path: "Fuzz/Driver", swiftSettings: settings),
        .target(
            name: "CCount",
            dependencies: ["CGnuTLS"],
            path: "Benchmarks/CCount",
            linkerSettings: [.linkedLibrary("gnutls")]
        ),
        .executableTarget(
            name: "channel-bench",
            dependencies: ["CCount", "NBD", "TLS", "IO"],
            path: "Benchmarks/Channels",
            swiftSettings: settings
        ),
        .target(
            name: "TestSupport",
            dependencies: ["Web", "TLS", "IO", "CLinux", "Emulator"],
            path: "Tests/Support",
            swiftSettings: settings
        ),
        .executableTarget(
            name: "standard-echo",
            dependencies: ["IO"],
            path: "Tests/StandardEcho",
            swiftSettings: settings
        ),
        .executableTarget(
            name: "name-lookup",
            dependencies: ["IO"],
            path: "Tests/NameLookup",
            swiftSettings: settings
        ),
        .testTarget(
            name: "IOTests",
            dependencies: ["IO", "TLS", "TestSupport", "standard-echo", "name-lookup"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "TLSTests",
            dependencies: ["TLS", "IO", "TestSupport", "FuzzTargets"],
            swiftSettings: settings
        ),
        .testTarget(name: "NBDTests", dependencies: ["NBD", "TLS", "IO", "TestSupport"], swiftSettings: settings),
        .testTarget(name: "EmulatorTests", dependencies: ["Emulator", "IO", "TestSupport"], swiftSettings: settings),
        .testTarget(
            name: "MigrationTests",
            dependencies: ["Migration", "NBD", "Emulator", "TLS", "IO", "TestSupport"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "SourceTests",
            dependencies: ["Source", "Migration", "NBD", "Emulator", "TLS", "IO", "TestSupport", "crossdock"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "DestinationTests",
            dependencies: ["Destination", "Migration", "NBD", "Emulator", "TLS", "IO", "TestSupport"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "FleetTests",
            dependencies: ["Fleet", "Migration", "TLS", "IO", "TestSupport", "crossdock"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "WebTests",
            dependencies: [
                "Web", "Source", "Migration", "Emulator", "TLS", "IO", "CLinux", "TestSupport", "crossdock",
            ],
            swiftSettings: settings
        ),
        .testTarget(
            name: "Interop",
            dependencies: ["NBD", "TLS", "IO", "TestSupport", "crossdock"],
            swiftSettings: settings
        ),
        .testTarget(
            name: "EndToEnd",
            dependencies: ["Web", "Source", "Migration", "NBD", "Emulator", "TLS", "IO", "TestSupport", "crossdock"],
            exclude: ["https.py"],
            swiftSettings: settings
        ),
    ],
    swiftLanguageModes: [.v6]
)
