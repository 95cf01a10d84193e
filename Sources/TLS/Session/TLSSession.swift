internal import CGnuTLS
internal import Glibc
internal import IO
internal import Synchronization

/// A TLS session that knows nothing about sockets: ciphertext goes in and out of two queues.
///
/// Several records are encrypted before anything is sent, and large reads feed several records, which saves most of
/// the system calls of a session on a socket. Confined to one loop, as GnuTLS sessions must be when both directions are
/// used (a TLS 1.3 key update touches both).
public final class TLSSession: @unchecked Sendable {
    // Unchecked: confined to the loop of the channel that owns it.

    /// How much plaintext a record carries at most (RFC 8446, section 5.1).
    public static let recordSize = 16384
    private static let inboundSize = 256 << 10
    /// How many sessions there are.
    private static let live = Atomic<Int>(0)
    private static var areMany: Bool { live.load(ordering: .relaxed) > 16 }
    /// How much ciphertext is gathered before it is sent. As much as half of a second-level cache gives the best throughput;
    /// a process with many sessions takes less, since each of them may hold so much.
    static var batchSize: Int { areMany ? 128 << 10 : 512 << 10 }
    /// How much ciphertext is read at once.
    static var readSize: Int { areMany ? 64 << 10 : inboundSize }

    private let handle: gnutls_session_t
    private let credentials: any TLSCredentials
    private let hostname: UnsafeMutablePointer<CChar>?
    private let purpose: UnsafeMutablePointer<CChar>
    private let verification: UnsafeMutablePointer<gnutls_typed_vdata_st>
    private let staging: UnsafeMutableRawPointer
    /// What the credentials loaded; a reload does not change a session that exists.
    let attachment: AnyObject
    let inbound: ByteFIFO
    let outbound: ByteFIFO
    private var isCounted = false
    /// Whether a certificate that the client shows is still to be judged.
    private var judgesShownCertificate = false
    /// Whether the transport has ended, so that an empty inbound queue means end of file.
    var transportEnded = false

    /// Whether the client of a server has to show a certificate.
    public enum ClientCertificate: Sendable {
        /// As the credentials say.
        case asCredentials
        /// It is asked for one and may have none; one that it shows has to be good. For credentials that verify their peers.
        case optional
    }

    /// Makes a session.
    ///
    /// - Parameters:
    ///   - credentials: which also decide the end.
    ///   - hostname: the name that a server's certificate must be for; required of a client that verifies certificates.
    ///   - clientCertificate: whether a server insists on a certificate.
    /// - Throws: `CredentialError`.
    public init(
        credentials: any TLSCredentials,
        hostname: String? = nil,
        clientCertificate: ClientCertificate = .asCredentials
    ) throws {
        self.credentials = credentials
        let isServer = credentials.endpoint == .server
        var session: gnutls_session_t?
        let flags =
            UInt32(isServer ? GNUTLS_SERVER : GNUTLS_CLIENT) | UInt32(GNUTLS_NONBLOCK.rawValue)
            | UInt32(GNUTLS_NO_SIGNAL.rawValue)
        try GnuTLS.check(gnutls_init(&session, flags), "Cannot make a TLS session")
        handle = session!
        do {
            attachment = try credentials.attach(to: session!)
        } catch {
            gnutls_deinit(session)
            throw error
        }
        let hostname = hostname.map(Self.withoutZone)
        self.hostname = hostname.map { strdup($0) }
        purpose = strdup(isServer ? GNUTLS_KP_TLS_WWW_CLIENT : GNUTLS_KP_TLS_WWW_SERVER)
        verification = .allocate(capacity: 2)
        verification.initialize(repeating: gnutls_typed_vdata_st(), count: 2)
        staging = .allocate(byteCount: Self.recordSize, alignment: 64)
        inbound = ByteFIFO(capacity: Self.inboundSize)
        outbound = ByteFIFO(capacity: 64 << 10)
        var position: UnsafePointer<CChar>?
        let code = gnutls_priority_set_direct(handle, credentials.priority, &position)
        if code < 0 {
            let rest = position.map { String(cString: $0) } ?? ""
            throw CredentialError("The TLS priority string is invalid at '\(rest)': \(GnuTLS.message(code))")
        }
        gnutls_session_set_ptr(handle, Unmanaged.passUnretained(self).toOpaque())
        if credentials.usesCertificates, credentials.verifiesPeer {
            if isServer, clientCertificate == .optional {
                requestCertificate()
            } else {
                try requireVerification(isServer)
            }
        }
        if let hostname, !isServer, !Self.isAddress(hostname) {
            gnutls_server_name_set(handle, GNUTLS_NAME_DNS, hostname, hostname.utf8.count)
        }
        installTransport()
        Self.live.wrappingAdd(1, ordering: .relaxed)
        isCounted = true
    }

    deinit {
        if isCounted { Self.live.wrappingSubtract(1, ordering: .relaxed) }
        gnutls_deinit(handle)
        free(hostname)
        free(purpose)
        verification.deallocate()
        staging.deallocate()
    }

    static func isAddress(_ name: String) -> Bool {
        var storage = in6_addr()
        return inet_pton(AF_INET, name, &storage) == 1 || inet_pton(AF_INET6, name, &storage) == 1
    }

    /// A link-local address without the interface that leads to it, which is this host's own affair: no certificate has it.
    static func withoutZone(_ name: String) -> String {
        let address = String(name.prefix { $0 != "%" })
        return address.contains(":") && isAddress(address) ? address : name
    }

    private func requireVerification(_ isServer: Bool) throws {
        var count: UInt32 = 0
        verification[0].type = GNUTLS_DT_KEY_PURPOSE_OID
        verification[0].data = UnsafeMutableRawPointer(purpose).assumingMemoryBound(to: UInt8.self)
        count = 1
        if !isServer {
            guard let hostname else {
                throw CredentialError(
                    "No hostname for certificate validation; give the name in the server's certificate"
                )
            }
            verification[1].type = GNUTLS_DT_DNS_HOSTNAME
            verification[1].data = UnsafeMutableRawPointer(hostname).assumingMemoryBound(to: UInt8.self)
            count = 2
        }
        gnutls_session_set_verify_cert2(handle, verification, count, 0)
    }

    /// Asks the client for a certificate and does without: GnuTLS's own verification would refuse who has none.
    private func requestCertificate() {
        gnutls_certificate_server_set_request(handle, GNUTLS_CERT_REQUEST)
        verification[0].type = GNUTLS_DT_KEY_PURPOSE_OID
        verification[0].data = UnsafeMutableRawPointer(purpose).assumingMemoryBound(to: UInt8.self)
        judgesShownCertificate = true
    }

    /// Judges the certificate that the client has shown, if it has shown one, with the same rules as those of others.
    private func judgeShownCertificate(_ peer: String) throws {
        judgesShownCertificate = false
        var (count, status): (UInt32, UInt32) = (0, 0)
        guard gnutls_certificate_get_peers(handle, &count) != nil, count > 0 else { return }
        let code = gnutls_certificate_verify_peers(handle, verification, 1, &status)
        guard code < 0 || status != 0 else { return }
        gnutls_alert_send(handle, GNUTLS_AL_FATAL, GNUTLS_A_BAD_CERTIFICATE)
        let reasons = code < 0 ? GnuTLS.message(code) : GnuTLS.reasons(status).joined(separator: ", ")
        throw ChannelError(
            .tls,
            "TLS handshake with \(peer) failed: its certificate was rejected: \(reasons)\(advice(status))"
        )
    }

    private func installTransport() {
        gnutls_transport_set_ptr(handle, Unmanaged.passUnretained(self).toOpaque())
        gnutls_transport_set_push_function(handle) { context, bytes, count in
            let session = Unmanaged<TLSSession>.fromOpaque(context!).takeUnretainedValue()
            session.outbound.append(UnsafeRawBufferPointer(start: bytes, count: count))
            return count
        }
        gnutls_transport_set_pull_function(handle) { context, buffer, capacity in
            let session = Unmanaged<TLSSession>.fromOpaque(context!).takeUnretainedValue()
            let count = min(capacity, session.inbound.count)
            if count == 0 {
                if session.transportEnded { return 0 }
                errno = EAGAIN
                return -1
            }
            memcpy(buffer!, session.inbound.bytes.baseAddress!, count)
            session.inbound.remove(count)
            return count
        }
        gnutls_transport_set_pull_timeout_function(handle) { context, _ in
            let session = Unmanaged<TLSSession>.fromOpaque(context!).takeUnretainedValue()
            return session.inbound.isEmpty && !session.transportEnded ? 0 : 1
        }
    }

    /// How far the handshake is.
    public enum HandshakeStatus: Sendable {
        /// It waits for ciphertext of the peer: `receive` some and go on.
        case receiving
        /// There is ciphertext for the peer: `send` it and go on.
        case sending
        /// It is done, and the peer is who it must be.
        case complete
    }

    /// Goes on with the handshake, for whoever carries the ciphertext without a channel: a thread with blocking calls, a
    /// protocol that wraps it.
    ///
    /// - Parameter peer: the peer's name, for messages.
    /// - Returns: what to do next. After `complete` there may still be ciphertext to send.
    /// - Throws: `ChannelError` with `Code.tls`, whose message says which certificate was rejected by whom and why; the
    ///   alert for the peer is left to `send`.
    public func handshake(with peer: String) throws -> HandshakeStatus {
        if try handshake(peer: peer) { return .complete }
        return outbound.isEmpty ? .receiving : .sending
    }

    /// Takes ciphertext that came from the peer; an empty buffer is the end of the transport.
    public func receive(_ ciphertext: UnsafeRawBufferPointer) {
        if ciphertext.isEmpty { transportEnded = true } else { inbound.append(ciphertext) }
    }

    /// Hands the ciphertext for the peer to `body`, which returns how many bytes of it were sent.
    public func send(_ body: (UnsafeRawBufferPointer) throws -> Int) rethrows {
        if !outbound.isEmpty { outbound.remove(try body(outbound.bytes)) }
    }

    /// Encrypts plaintext for `send`.
    ///
    /// - Returns: how many bytes were taken; fewer than given when too much ciphertext waits to be sent.
    public func encrypt(_ plaintext: UnsafeRawBufferPointer) throws -> Int {
        var vector = iovec(
            iov_base: UnsafeMutableRawPointer(mutating: plaintext.baseAddress),
            iov_len: plaintext.count
        )
        return try withUnsafePointer(to: &vector) { try encrypt(UnsafeBufferPointer(start: $0, count: 1)) }
    }

    /// Decrypts what was received into a buffer.
    ///
    /// - Returns: the number of bytes; 0 after the peer's close_notify; nil when more ciphertext is needed.
    public func decrypt(into buffer: UnsafeMutableRawBufferPointer) throws -> Int? {
        try decrypt(into: buffer, peer: "the peer")
    }

    /// Goes on with the handshake.
    ///
    /// - Returns: whether it is done; otherwise more ciphertext is needed.
    /// - Throws: `ChannelError` with `Code.tls`, whose message says which certificate was rejected by whom and why.
    func handshake(peer: String) throws -> Bool {
        while true {
            let code = gnutls_handshake(handle)
            if code == GNUTLS_E_SUCCESS {
                if judgesShownCertificate { try judgeShownCertificate(peer) }
                return true
            }
            if code == GNUTLS_E_AGAIN { return false }
            if code == GNUTLS_E_INTERRUPTED || gnutls_error_is_fatal(code) == 0 { continue }
            // The peer should learn the reason, so the alert goes out before the error does.
            gnutls_alert_send_appropriate(handle, code)
            throw failure(code, peer: peer, during: "TLS handshake with \(peer) failed")
        }
    }

    /// Encrypts as much as the batch has room for.
    ///
    /// Small pieces are gathered, so that a header and its payload share a record.
    ///
    /// - Parameters:
    ///   - buffers: the plaintext.
    ///   - wholeRecords: whether what is left at the end and fills no record is not taken.
    /// - Returns: how many bytes of plaintext were taken.
    func encrypt(_ buffers: UnsafeBufferPointer<iovec>, wholeRecords: Bool = false) throws -> Int {
        var remaining = 0
        for buffer in buffers { remaining += buffer.iov_len }
        let limit = Self.batchSize
        var taken = 0
        var index = 0
        var offset = 0
        let least = wholeRecords ? Self.recordSize : 1
        while remaining >= least, outbound.count < limit {
            while offset == buffers[index].iov_len {
                index += 1
                offset = 0
            }
            let size = min(remaining, Self.recordSize)
            let available = buffers[index].iov_len - offset
            if available >= size {
                try send(buffers[index].iov_base! + offset, size)
                offset += size
            } else {
                var gathered = 0
                while gathered < size {
                    if offset == buffers[index].iov_len {
                        index += 1
                        offset = 0
                        continue
                    }
                    let count = min(size - gathered, buffers[index].iov_len - offset)
                    memcpy(staging + gathered, buffers[index].iov_base! + offset, count)
                    gathered += count
                    offset += count
                }
                try send(staging, size)
            }
            taken += size
            remaining -= size
        }
        return taken
    }

    private func send(_ bytes: UnsafeRawPointer, _ count: Int) throws {
        var done = 0
        while done < count {
            let sent = gnutls_record_send(handle, bytes + done, count - done)
            if sent < 0 {
                if sent == Int(GNUTLS_E_AGAIN) || sent == Int(GNUTLS_E_INTERRUPTED) { continue }
                throw ChannelError(.tls, "Cannot encrypt: \(GnuTLS.message(Int32(sent)))")
            }
            done += sent
        }
    }

    /// Decrypts into `buffer` as much as is there.
    ///
    /// - Returns: the number of bytes; 0 after the peer's close_notify; nil when more ciphertext is needed.
    func decrypt(into buffer: UnsafeMutableRawBufferPointer, peer: String) throws -> Int? {
        var done = 0
        while done < buffer.count {
            let waiting = inbound.count
            let count = gnutls_record_recv(handle, buffer.baseAddress! + done, buffer.count - done)
            if count > 0 {
                done += count
            } else if count == 0 {
                return done
            } else if count == Int(GNUTLS_E_AGAIN) {
                // GnuTLS also says "again" after a message of its own, a session ticket or a key update, although the
                // records behind it are here already.
                if !inbound.isEmpty, inbound.count < waiting { continue }
                return done > 0 ? done : nil
            } else if count == Int(GNUTLS_E_INTERRUPTED) || gnutls_error_is_fatal(Int32(count)) == 0 {
                continue
            } else if done > 0 {
                // What arrived before the failure is delivered; GnuTLS repeats the error at the next call.
                return done
            } else {
                throw failure(Int32(count), peer: peer, during: "The TLS session with \(peer) failed")
            }
        }
        return done
    }

    /// Makes a new key for the outgoing direction (RFC 8446, section 4.6.3), as GnuTLS does by itself after 2^24 records.
    /// Only in TLS 1.3.
    ///
    /// - Parameter askPeer: whether the peer is asked for a new key too. GnuTLS ends the session when both ends ask at the same
    ///   time, and when a peer makes more than eight new keys in a second.
    /// - Throws: `ChannelError` with `Code.tls` when the session is not in TLS 1.3.
    public func updateKeys(askPeer: Bool = false) throws {
        let code = gnutls_session_key_update(handle, askPeer ? UInt32(GNUTLS_KU_PEER) : 0)
        guard code >= 0 else { throw ChannelError(.tls, "Cannot update the keys: \(GnuTLS.message(code))") }
    }

    /// Queues a close_notify.
    public func closeNotify() { _ = gnutls_bye(handle, GNUTLS_SHUT_WR) }

    private func failure(_ code: Int32, peer: String, during activity: String) -> ChannelError {
        switch code {
        case GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR:
            let status = gnutls_session_get_verify_cert_status(handle)
            let reasons = GnuTLS.reasons(status).joined(separator: ", ")
            return ChannelError(.tls, "\(activity): its certificate was rejected: \(reasons)\(advice(status))")
        case GNUTLS_E_FATAL_ALERT_RECEIVED:
            let alert = gnutls_alert_get(handle)
            let text = gnutls_alert_get_name(alert).map { String(cString: $0) } ?? "alert \(alert.rawValue)"
            return ChannelError(.tls, "\(activity): \(peer) refused us: \(text). \(remedy(alert))")
        case GNUTLS_E_UNEXPECTED_PACKET_LENGTH, GNUTLS_E_UNSUPPORTED_VERSION_PACKET, GNUTLS_E_UNEXPECTED_PACKET,
            GNUTLS_E_RECORD_OVERFLOW:
            return ChannelError(.protocolViolation, "\(activity): \(peer) does not speak TLS there")
        case GNUTLS_E_PREMATURE_TERMINATION, GNUTLS_E_INVALID_SESSION:
            return ChannelError(.truncated, "\(activity): \(peer) closed the connection without a TLS end")
        case GNUTLS_E_CERTIFICATE_REQUIRED, GNUTLS_E_NO_CERTIFICATE_FOUND:
            return ChannelError(.tls, "\(activity): \(peer) presented no certificate")
        default:
            return ChannelError(.tls, "\(activity): \(GnuTLS.message(code))")
        }
    }

    /// What an operator has to know of a certificate that was rejected, behind the reasons.
    private func advice(_ status: UInt32) -> String {
        if status & (GNUTLS_CERT_SIGNER_NOT_FOUND.rawValue | GNUTLS_CERT_SIGNATURE_FAILURE.rawValue) != 0 {
            return
                "; both ends need certificates of one authority ('crossdock pki issue'), ours is that in \(credentials.directory)"
        }
        guard status & GNUTLS_CERT_UNEXPECTED_OWNER.rawValue != 0 else { return "" }
        let wanted = hostname.map { String(cString: $0) } ?? ""
        // Only what the authority has signed is worth being shown.
        let isSigned = status & ~(GNUTLS_CERT_UNEXPECTED_OWNER.rawValue | GNUTLS_CERT_INVALID.rawValue) == 0
        let names = isSigned ? peer.hostNames : []
        let has = names.isEmpty ? "" : ", but \(names.joined(separator: ", "))"
        let issue = (names + [wanted]).joined(separator: " ")
        return
            " '\(wanted)'\(has); call the host by a name that it has, or issue its certificate anew: "
            + "'crossdock pki issue AUTHORITY DIRECTORY \(issue)'"
    }

    private func remedy(_ alert: gnutls_alert_description_t) -> String {
        switch alert {
        case GNUTLS_A_CERTIFICATE_EXPIRED: "Our certificate in \(credentials.directory) has expired; issue a new one"
        case GNUTLS_A_CERTIFICATE_REQUIRED:
            "Put client-cert.pem and client-key.pem into \(credentials.directory)"
        case GNUTLS_A_BAD_CERTIFICATE where credentials.endpoint == .server:
            // A client says the same of an authority that it does not know and of a name that it did not expect.
            "Either its ca-cert.pem is not the authority of our certificate in \(credentials.directory), or it calls this host by a name "
                + "that is not in that certificate; its own message says which"
        case GNUTLS_A_UNKNOWN_CA, GNUTLS_A_BAD_CERTIFICATE, GNUTLS_A_CERTIFICATE_UNKNOWN:
            "Its ca-cert.pem must be the authority of our certificate in \(credentials.directory)"
        case GNUTLS_A_CERTIFICATE_REVOKED: "Our certificate in \(credentials.directory) was revoked"
        case GNUTLS_A_UNKNOWN_PSK_IDENTITY, GNUTLS_A_DECRYPT_ERROR:
            "Both ends need the same key in keys.psk"
        default: "Its log has the reason"
        }
    }

    /// Bytes that only the two ends of this very session know, and that no other session has: an exporter (RFC 5705; RFC 8446,
    /// section 7.5). What is bound to them holds in no session that somebody in between has made. Valid after the handshake.
    ///
    /// - Parameters:
    ///   - label: what the bytes are for; each use has its own.
    ///   - count: how many bytes.
    /// - Throws: `ChannelError` with `Code.tls`.
    public func exportKey(_ label: String, count: Int) throws -> [UInt8] {
        var key = [UInt8](repeating: 0, count: count)
        let code = key.withUnsafeMutableBytes { bytes in
            gnutls_prf_rfc5705(
                handle,
                label.utf8.count,
                label,
                0,
                nil,
                count,
                bytes.baseAddress?.assumingMemoryBound(to: CChar.self)
            )
        }
        guard code >= 0 else { throw ChannelError(.tls, "Cannot export a key: \(GnuTLS.message(code))") }
        return key
    }

    /// Who the peer proved to be; valid after the handshake.
    public var peer: TLSPeer {
        var peer = TLSPeer()
        if credentials.usesCertificates {
            var count: UInt32 = 0
            guard let list = gnutls_certificate_get_peers(handle, &count), count > 0 else { return peer }
            var datum = list[0]
            let der = UnsafeRawBufferPointer(start: datum.data, count: Int(datum.size))
            var digest = [UInt8](repeating: 0, count: HashAlgorithm.sha256.digestLength)
            digest.withUnsafeMutableBytes { HashAlgorithm.sha256.hash(der, into: $0.baseAddress!) }
            // A certificate may have no subject; two of that kind must not look like one peer.
            peer.fingerprint = "SHA256:\(digest.hex)"
            var handle: gnutls_x509_crt_t?
            guard gnutls_x509_crt_init(&handle) == 0, let handle else { return peer }
            let certificate = Certificate(adopting: handle)
            guard gnutls_x509_crt_import(handle, &datum, GNUTLS_X509_FMT_DER) == 0 else { return peer }
            let subject = certificate.subject
            peer.distinguishedName = subject.isEmpty ? nil : subject
            peer.alternativeNames = certificate.alternativeNames
        } else if credentials.endpoint == .server {
            var name = gnutls_datum_t()
            guard gnutls_psk_server_get_username2(handle, &name) == 0, let base = name.data else { return peer }
            peer.pskUser = PSKCredentials.text(of: Array(UnsafeBufferPointer(start: base, count: Int(name.size))))
        }
        return peer
    }

    /// The negotiated version as people write it: "1.3".
    public var version: String {
        switch gnutls_protocol_get_version(handle) {
        case GNUTLS_TLS1_3: "1.3"
        case GNUTLS_TLS1_2: "1.2"
        default: "unknown"
        }
    }

    /// The negotiated cipher, for example "AES-128-GCM".
    public var cipher: String {
        gnutls_cipher_get_name(gnutls_cipher_get(handle)).map { String(cString: $0) } ?? "none"
    }
}
