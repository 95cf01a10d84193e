import ArgumentParser
import Emulator
import Fleet
import Migration
import TLS

/// Prints an error as one line and ends the program with its documented code.
func failing<T>(_ body: () async throws -> T) async throws -> T {
    do {
        return try await body()
    } catch let error as ExitCode {
        throw error
    } catch {
        printError("crossdock: \(error)")
        throw ExitCode(documentedCode(of: error))
    }
}

/// The documented code of an error.
func documentedCode(of error: any Error) -> Int32 {
    switch error {
    case let error as MigrationError: error.code.rawValue
    case is CredentialError: MigrationError.Code.security.rawValue
    case is GuestError: MigrationError.Code.guest.rawValue
    case is PairingFailure, is FleetError: 30
    case is ValidationError: ExitCode.validationFailure.rawValue
    default: 1
    }
}
