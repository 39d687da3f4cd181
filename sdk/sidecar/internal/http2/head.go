// What a request may look like. HTTP/2 cannot be smuggled through itself, but what
// stands behind the app may speak HTTP/1.1, so whatever could mean two things there is
// refused here (SECURITY.md T13 to T18).

package http2

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"

	"merlon.dev/policy"
	"merlon.dev/sdk/sidecar/internal/hop"
)

// head is a request without its body.
type head struct {
	method, scheme, authority string
	path, query               string // target is path, "?" and query
	target                    string
	length                    int64               // content-length; -1: not said
	fields                    []hpack.HeaderField // the regular ones, without host
	sent                      sent                // those of them that the policy sees
}

// malformedError says why a list is no request at all (RFC 9113 section 8.1.1). What
// is one, and refused all the same, gives other errors.
type malformedError struct{ why string }

// Error implements error.
func (e *malformedError) Error() string { return "malformed request: " + e.why }

func malformed(format string, args ...any) error {
	return &malformedError{fmt.Sprintf(format, args...)}
}

// readHead checks list and takes it apart. What it gives beside an error is for the
// log.
func readHead(list []hpack.HeaderField, grpc bool) (head, error) {
	h := head{length: -1}
	n := 0
	for n < len(list) && list[n].IsPseudo() {
		if err := h.pseudo(list[n]); err != nil {
			return h, err
		}
		n++
	}
	h.path, h.query, _ = strings.Cut(h.target, "?")
	h.fields = make([]hpack.HeaderField, 0, len(list)-n+2) // two more are set
	hosts := 0
	for _, f := range list[n:] {
		if err := h.field(f, &hosts); err != nil {
			return h, err
		}
	}
	if h.method == "CONNECT" {
		return h, errors.New("CONNECT would open a tunnel past the policy")
	}
	if h.method == "" || h.scheme == "" || h.target == "" {
		return h, malformed("one of :method, :scheme and :path is missing")
	}
	if err := h.check(); err != nil {
		return h, err
	}
	if grpc {
		return h, h.checkGRPC()
	}
	return h, nil
}

// pseudo takes in a pseudo-header field.
func (h *head) pseudo(f hpack.HeaderField) error {
	var to *string
	switch f.Name {
	case ":method":
		to = &h.method
	case ":scheme":
		to = &h.scheme
	case ":authority":
		to = &h.authority
	case ":path":
		to = &h.target
	default: // also :protocol: extended CONNECT is not offered
		return malformed("the pseudo-header field %.40q", f.Name)
	}
	switch {
	case *to != "":
		return malformed("%s occurs twice", f.Name)
	case f.Value == "":
		return malformed("%s is empty", f.Name)
	case !isValue(f.Value):
		return malformed("%s has a character that no header field may have", f.Name)
	}
	*to = f.Value
	return nil
}

// field takes in a regular field.
func (h *head) field(f hpack.HeaderField, hosts *int) error {
	if err := checkField(f); err != nil {
		return err
	}
	switch f.Name {
	case "te":
		if f.Value != "trailers" {
			return malformed("te is not %q", "trailers")
		}
	case "content-length":
		n, err := strconv.ParseInt(f.Value, 10, 64)
		if err != nil || strings.Trim(f.Value, "0123456789") != "" || h.length >= 0 && n != h.length {
			return malformed("content-length is no number, or two")
		}
		if h.length >= 0 {
			return nil // said again
		}
		h.length = n
	case "host":
		if *hosts++; *hosts > 1 || h.authority != "" && f.Value != h.authority {
			return errors.New("the host field and :authority differ")
		}
		h.authority = f.Value
		return nil
	}
	h.fields = append(h.fields, f)
	return nil
}

// check is about the request as a whole.
func (h *head) check() error {
	switch {
	case !isToken(h.method, false):
		return malformed(":method is no token")
	case h.scheme != "http" && h.scheme != "https":
		return fmt.Errorf(":scheme is %.20q, neither http nor https", h.scheme)
	case h.authority == "":
		return errors.New("there is no :authority")
	case strings.ContainsAny(h.authority, "/?#@\\ \t\"<>^`{|},"):
		return malformed(":authority is no host")
	}
	if err := policy.CheckPath(h.path); err != nil {
		return err
	}
	if strings.ContainsFunc(h.target, func(r rune) bool { return r <= ' ' || r == '#' || r == 0x7f }) {
		return errors.New("the request target has a fragment, a space or a control character")
	}
	return nil
}

// checkGRPC is what else a call has to be, where the app takes nothing but calls. What
// it serves beside them would be decided as one.
func (h *head) checkGRPC() error {
	if h.method != "POST" {
		return errors.New("a gRPC call is a POST")
	}
	if service, method, ok := strings.Cut(h.path[1:], "/"); !ok || service == "" || method == "" || strings.Contains(method, "/") || h.query != "" {
		return errors.New("a gRPC path is /package.Service/Method")
	}
	is := func(f hpack.HeaderField) bool { return f.Name == "content-type" }
	i := slices.IndexFunc(h.fields, is)
	if i < 0 || slices.ContainsFunc(h.fields[i+1:], is) || !isGRPC(h.fields[i].Value) {
		return errors.New("the content-type is not gRPC's")
	}
	return nil
}

func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(contentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// checkTrailers is for the fields behind a body.
func checkTrailers(list []hpack.HeaderField) error {
	for _, f := range list {
		if f.IsPseudo() {
			return malformed("a pseudo-header field in trailers")
		}
		if err := checkField(f); err != nil {
			return err
		}
	}
	return nil
}

// readAnswer checks the list of an answer, and gives its regular fields.
func readAnswer(list []hpack.HeaderField) (status int, fields []hpack.HeaderField, err error) {
	if len(list) == 0 || list[0].Name != ":status" || len(list[0].Value) != 3 {
		return 0, nil, malformed("no :status")
	}
	status, err = strconv.Atoi(list[0].Value)
	if err != nil || status < 100 || status > 599 || status == 101 {
		return 0, nil, malformed(":status is %.5q", list[0].Value)
	}
	return status, list[1:], checkTrailers(list[1:])
}

// checkField is what no list may have, on any side.
func checkField(f hpack.HeaderField) error {
	switch {
	case f.IsPseudo():
		return malformed("the pseudo-header field %.40q after others", f.Name)
	case !isToken(f.Name, true):
		return malformed("the name %.40q", f.Name)
	case !isValue(f.Value):
		return malformed("the value of %.40s", f.Name)
	}
	switch name := strings.ReplaceAll(f.Name, "_", "-"); name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return malformed("%s, which is of one connection", f.Name)
	case "content-length", "host", "te", "trailer", "expect":
		if name != f.Name { // CGI and the like take it for that name
			return malformed("%s, a name of the message's framing with an underscore", f.Name)
		}
	}
	return nil
}

// tokenBytes are those of RFC 9110 section 5.6.2.
var tokenBytes = func() (t [256]bool) {
	for _, c := range []byte("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") {
		t[c] = true
	}
	return t
}()

func isToken(s string, lower bool) bool {
	for i := range len(s) {
		if c := s[i]; !tokenBytes[c] || lower && 'A' <= c && c <= 'Z' {
			return false
		}
	}
	return s != ""
}

// isValue says whether s may be sent as a value: no control characters, nor white
// space around it.
func isValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return s == "" || !isBlank(s[0]) && !isBlank(s[len(s)-1])
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

// input is the request as the policy sees it, also when others change what is forwarded.
func (h *head) input(protocol policy.Protocol) *policy.Input {
	h.sent = sent(h.fields)
	return &policy.Input{Protocol: protocol, Method: h.method, Path: h.path, Query: h.query, Host: h.authority, Headers: &h.sent}
}

// strip takes out what claims an identity, or else stays behind.
func (h *head) strip(stays func(name string) bool) {
	h.fields = slices.DeleteFunc(h.fields, func(f hpack.HeaderField) bool { return stays(f.Name) })
}

// values are those of a field.
func (h *head) values(name string) (values []string) {
	for _, f := range h.fields {
		if f.Name == name {
			values = append(values, f.Value)
		}
	}
	return values
}

// asDecided takes out what the policy takes away, and adds what it adds, and who the
// caller is.
func (h *head) asDecided(send *policy.Response, caller *hop.Caller) {
	if send != nil {
		h.fields = slices.DeleteFunc(slices.Clone(h.fields), func(f hpack.HeaderField) bool { return send.Replaces(f.Name) })
		h.fields = append(h.fields, fieldsOf(send.Headers)...)
	}
	if caller.ID != "" {
		h.fields = append(h.fields, hpack.HeaderField{Name: hop.IDField, Value: caller.ID}, hpack.HeaderField{Name: hop.CertField, Value: caller.Cert})
	}
}
