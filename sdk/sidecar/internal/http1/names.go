// Names of header fields in lower case, as policies and the rules about identities
// see them, without an allocation for those that every request has.

package http1

// known are common names; Go compares and finds them without a copy.
var known = func() map[string]string {
	m := make(map[string]string)
	for _, name := range []string{
		"accept", "accept-charset", "accept-encoding", "accept-language", "authorization", "baggage", "cache-control", "connection",
		"content-encoding", "content-language", "content-length", "content-type", "cookie", "date", "dnt", "expect", "forwarded", "from",
		"host", "if-match", "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "keep-alive", "origin", "pragma",
		"priority", "range", "referer", "sec-fetch-dest", "sec-fetch-mode", "sec-fetch-site", "sec-websocket-extensions",
		"sec-websocket-key", "sec-websocket-protocol", "sec-websocket-version", "te", "traceparent", "tracestate", "trailer",
		"transfer-encoding", "upgrade", "user-agent", "via", "x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-host",
		"x-forwarded-proto", "x-request-id", "x-spiffe-id",
	} {
		m[name] = name
	}
	return m
}()

// lowerName gives name in lower case.
func lowerName(name []byte) string {
	var short [64]byte
	lower := short[:0]
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		lower = append(lower, c)
	}
	if s, ok := known[string(lower)]; ok {
		return s
	}
	return string(lower)
}
