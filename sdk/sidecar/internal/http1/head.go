// What a head of HTTP/1.1 may look like. The rules are stricter than RFC 9112 where
// it leaves a choice: whatever two readers could understand differently, one of
// which has decided and the other of which serves, is refused (SECURITY.md T14, T17).
// Nothing is repaired or written anew: the lines that pass are those that go on.

package http1

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// field is one line of a head, by offsets into it: the whole line with its CRLF, the
// name, and the value without the white space around it.
type field struct {
	start, nameEnd, value, valueEnd, end int32
	kind                                 kind
	drop                                 bool // it does not go on
}

// kind is what a field means to this package.
type kind uint8

// Fields that say something about the message or the connection.
const (
	other kind = iota
	host
	contentLength
	transferEncoding
	connection
	upgrade
	expect
	hopByHop // TE, Keep-Alive and the like: of one connection, and never sent on
)

// kinds has the names in lower case. Whoever takes "_" for "-", as CGI does, would
// read a message's length from a field that we do not look at.
var kinds = map[string]kind{
	"host":              host,
	"content-length":    contentLength,
	"transfer-encoding": transferEncoding,
	"connection":        connection,
	"upgrade":           upgrade,
	"expect":            expect,
	"te":                hopByHop,
	"keep-alive":        hopByHop,
	"proxy-connection":  hopByHop,
	"http2-settings":    hopByHop,
}

// message is a head and what was found in it. Everything points into raw.
type message struct {
	raw    []byte
	fields []field

	method, target []byte // of a request
	status         int    // of an answer
	oldVersion     bool   // an answer of HTTP/1.0

	host       []byte
	length     int64 // -1: not given
	chunked    bool
	close      bool     // the connection ends with this message
	keepAlive  bool     // said explicitly, for HTTP/1.0
	upgrade    bool     // Connection names upgrade
	webSocket  bool     // the Upgrade field is websocket
	hasUpgrade bool     // there is an Upgrade field, whatever it says
	expects    bool     // 100-continue
	named      []string // further fields that Connection names, in lower case
}

func (m *message) reset() {
	*m = message{fields: m.fields[:0], named: m.named[:0], length: -1}
}

func (m *message) name(f *field) []byte { return m.raw[f.start:f.nameEnd] }
func (m *message) val(f *field) []byte  { return m.raw[f.value:f.valueEnd] }
func (m *message) line(f *field) []byte { return m.raw[f.start:f.end] }

// errLong is for a head beyond the limits.
var errLong = errors.New("the head is too long or has too many fields")

// endOfHead looks for the end of a head in b, of which the first from bytes have been
// looked at: they are whole lines. It returns where the head ends, or 0 and from where
// to look next. A line that ends in LF alone is refused at once.
func endOfHead(b []byte, from int) (end, next int, err error) {
	for {
		i := bytes.IndexByte(b[from:], '\n')
		if i < 0 {
			return 0, from, nil
		}
		if i == 0 || b[from+i-1] != '\r' {
			return 0, from, errors.New("a line ends without CR")
		}
		if i == 1 {
			return from + 2, from, nil
		}
		from += i + 1
	}
}

// parseRequest reads the head of a request, which endOfHead has found.
func (m *message) parseRequest(raw []byte, maxFields int) error {
	m.reset()
	m.raw = raw
	line, rest := cutLine(raw)
	method, after, ok1 := bytes.Cut(line, space)
	target, version, ok2 := bytes.Cut(after, space)
	switch {
	case !ok1 || !ok2 || !isToken(method):
		return errors.New("the request line is malformed")
	case string(version) != "HTTP/1.1":
		return fmt.Errorf("the version is %.20q and not HTTP/1.1", version)
	}
	m.method, m.target = method, target
	if err := checkTarget(target); err != nil {
		return err
	}
	if err := m.parseFields(rest, maxFields); err != nil {
		return err
	}
	return m.checkRequest()
}

var space = []byte(" ")

// cutLine gives the first line without its CRLF, and where the next begins.
func cutLine(raw []byte) (line []byte, rest int) {
	i := bytes.IndexByte(raw, '\n') // endOfHead has seen that CR stands before it
	return raw[:i-1], i + 1
}

// checkTarget takes the origin form alone, without a fragment. That the path is not
// ambiguous is for policy.CheckPath to say.
func checkTarget(target []byte) error {
	if len(target) == 0 || target[0] != '/' {
		return errors.New("the request target is not a path")
	}
	for _, c := range target {
		if c <= ' ' || c == 0x7f || c == '#' {
			return errors.New("the request target has a character that must be encoded")
		}
	}
	return nil
}

// parseFields reads the field lines from offset at to the empty line.
func (m *message) parseFields(at, maxFields int) error {
	for {
		line, n := cutLine(m.raw[at:])
		if len(line) == 0 {
			return nil
		}
		if len(m.fields) == maxFields {
			return errLong
		}
		f, err := parseField(line, at)
		if err != nil {
			return err
		}
		f.end = int32(at + n)
		m.fields = append(m.fields, f)
		if err := m.note(&m.fields[len(m.fields)-1]); err != nil {
			return err
		}
		at += n
	}
}

func parseField(line []byte, at int) (field, error) {
	colon := bytes.IndexByte(line, ':')
	if colon <= 0 || !isToken(line[:colon]) { // also a line that continues the one before
		return field{}, errors.New("a header field is malformed")
	}
	from, to := colon+1, len(line)
	for from < to && (line[from] == ' ' || line[from] == '\t') {
		from++
	}
	for to > from && (line[to-1] == ' ' || line[to-1] == '\t') {
		to--
	}
	for _, c := range line[from:to] {
		if c < ' ' && c != '\t' || c == 0x7f {
			return field{}, errors.New("a header field has a control character")
		}
	}
	return field{start: int32(at), nameEnd: int32(at + colon), value: int32(at + from), valueEnd: int32(at + to), kind: kindOf(line[:colon])}, nil
}

// longestKind is the length of the longest name in kinds.
const longestKind = len("transfer-encoding")

func kindOf(name []byte) kind {
	if len(name) > longestKind {
		return other
	}
	var lower [longestKind]byte
	for i, c := range name {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c == '_' {
			c = '-'
		}
		lower[i] = c
	}
	return kinds[string(lower[:len(name)])]
}

// note takes in what f says about the message.
func (m *message) note(f *field) error {
	if f.kind == other {
		return nil
	}
	if bytes.IndexByte(m.name(f), '_') >= 0 {
		return errors.New("a field of the message's framing is written with an underscore")
	}
	v := m.val(f)
	switch f.kind {
	case host:
		if m.host != nil {
			return errors.New("there is more than one Host field")
		}
		if !isHost(v) {
			return errors.New("the Host field is malformed")
		}
		m.host = v
	case contentLength:
		if m.length >= 0 {
			return errors.New("there is more than one Content-Length")
		}
		n, ok := parseLength(v)
		if !ok {
			return errors.New("Content-Length is not a number")
		}
		m.length = n
	case transferEncoding:
		if m.chunked || !equalFold(v, "chunked") {
			return errors.New("Transfer-Encoding is not exactly chunked")
		}
		m.chunked = true
	case connection:
		return m.noteConnection(v)
	case upgrade:
		if m.hasUpgrade {
			return errors.New("there is more than one Upgrade field")
		}
		m.hasUpgrade, m.webSocket = true, equalFold(v, "websocket")
	case expect:
		if m.expects || !equalFold(v, "100-continue") {
			return errors.New("an Expect field is not exactly 100-continue")
		}
		m.expects = true
	}
	return nil
}

// noteConnection takes in which fields are for this connection alone. Those that say
// where the message goes and ends are not the sender's to take out: whoever reads
// them before they go and who reads after would see two messages.
func (m *message) noteConnection(v []byte) error {
	for len(v) > 0 {
		var option []byte
		option, v, _ = bytes.Cut(v, []byte(","))
		option = bytes.Trim(option, " \t")
		switch {
		case len(option) == 0:
		case equalFold(option, "close"):
			m.close = true
		case equalFold(option, "keep-alive"):
			m.keepAlive = true
		case equalFold(option, "upgrade"):
			m.upgrade = true
		case !isToken(option):
			return errors.New("the Connection field is malformed")
		default:
			switch kindOf(option) {
			case host, contentLength, transferEncoding, expect:
				return errors.New("the Connection field names a field of the message's framing")
			}
			m.named = append(m.named, strings.ToLower(string(option)))
		}
	}
	return nil
}

// names says whether Connection names the field, whose name is in lower case.
func (m *message) names(lower string) bool { return slices.Contains(m.named, lower) }

func (m *message) checkRequest() error {
	switch {
	case m.host == nil:
		return errors.New("there is no Host field")
	case m.chunked && m.length >= 0:
		return errors.New("there is a Content-Length beside Transfer-Encoding")
	case string(m.method) == "CONNECT":
		return errors.New("CONNECT would open a tunnel past the policy") // T18
	case m.hasUpgrade && (!m.webSocket || !m.upgrade || string(m.method) != "GET" || m.chunked || m.length > 0):
		return errors.New("the connection is to be upgraded to something else than a WebSocket") // T18
	}
	return nil
}

// parseAnswer reads the head of an answer to a request, which endOfHead has found.
func (m *message) parseAnswer(raw []byte, maxFields int) error {
	m.reset()
	m.raw = raw
	line, rest := cutLine(raw)
	const before = len("HTTP/1.1 ")
	if len(line) < before+3 || len(line) > before+3 && line[before+3] != ' ' {
		return errors.New("the status line is malformed")
	}
	switch string(line[:before]) {
	case "HTTP/1.1 ":
	case "HTTP/1.0 ":
		m.oldVersion = true
	default:
		return errors.New("the status line is malformed")
	}
	for _, c := range line[before : before+3] {
		if c < '0' || c > '9' {
			return errors.New("the status line is malformed")
		}
		m.status = 10*m.status + int(c-'0')
	}
	for _, c := range line[before+3:] {
		if c < ' ' && c != '\t' || c == 0x7f {
			return errors.New("the status line has a control character")
		}
	}
	if m.status < 100 {
		return errors.New("the status line is malformed")
	}
	if err := m.parseFields(rest, maxFields); err != nil {
		return err
	}
	if m.chunked && (m.length >= 0 || m.oldVersion) {
		return errors.New("the answer's length is ambiguous")
	}
	m.close = m.close || m.oldVersion && !m.keepAlive
	return nil
}

// parseLength reads digits, as many as an int64 is sure to hold.
func parseLength(v []byte) (n int64, ok bool) {
	if len(v) == 0 || len(v) > 18 {
		return 0, false
	}
	for _, c := range v {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = 10*n + int64(c-'0')
	}
	return n, true
}

// tokenChars are those of RFC 9110 section 5.6.2; hostChars those of a name, of an
// address and of a port.
var (
	tokenChars = set("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
	hostChars  = set("-._~:[]0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
)

func set(chars string) (table [256]bool) {
	for i := range len(chars) {
		table[chars[i]] = true
	}
	return table
}

func isToken(b []byte) bool { return len(b) > 0 && all(b, &tokenChars) }

func isHost(b []byte) bool { return len(b) > 0 && all(b, &hostChars) }

func all(b []byte, table *[256]bool) bool {
	for _, c := range b {
		if !table[c] {
			return false
		}
	}
	return true
}

// equalFold compares with s, which is in lower case, in ASCII.
func equalFold(b []byte, s string) bool {
	if len(b) != len(s) {
		return false
	}
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		if c != s[i] {
			return false
		}
	}
	return true
}
