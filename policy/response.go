package policy

// This file decides what a policy may have sent beside its decision: the object
// that policies of opa-envoy-plugin answer with. It may say how a denial looks,
// and add or take away header fields; it may not say who the caller is, nor where
// a message ends.

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Response is what the policy wants sent with a decision. Enforcement points send
// it as it is, once Check has passed it.
type Response struct {
	// Status is the HTTP status of a denial; 0 for 403. It says nothing of a call
	// that is allowed.
	Status int
	// Body is that of a denial; empty for the problem document.
	Body string
	// Headers go with the answer of a denial. Of a call that is allowed the handler
	// or server behind finds them in the request, in the place of the caller's of the
	// same names.
	Headers []HeaderField
	// ResponseHeaders go with the answer to a call that is allowed, unless the handler
	// sets one of the name.
	ResponseHeaders []HeaderField
	// RemoveHeaders are taken out of the request of a call that is allowed.
	RemoveHeaders []string
}

// HeaderField is one line of a header; its name is in lower case.
type HeaderField struct{ Name, Value string }

// Bounds of a Response.
const (
	maxResponseBody   = 64 << 10
	maxResponseFields = 100
	maxResponseField  = 8 << 10
)

// Check says what in r no enforcement point may send.
func (r *Response) Check() error {
	switch {
	case r.Status != 0 && (r.Status < 200 || r.Status > 599):
		return fmt.Errorf("http_status %d is none of 200 to 599", r.Status)
	case len(r.Body) > maxResponseBody:
		return fmt.Errorf("body is longer than %d bytes", maxResponseBody)
	case !utf8.ValidString(r.Body):
		return errors.New("body is not valid UTF-8")
	case len(r.Headers)+len(r.ResponseHeaders)+len(r.RemoveHeaders) > maxResponseFields:
		return fmt.Errorf("more than %d header fields", maxResponseFields)
	}
	for _, fields := range [][]HeaderField{r.Headers, r.ResponseHeaders} {
		for i := range fields {
			if err := fields[i].check(); err != nil {
				return err
			}
		}
	}
	for _, name := range r.RemoveHeaders {
		if err := checkFieldName(name); err != nil {
			return err
		}
	}
	return nil
}

func (f *HeaderField) check() error {
	if err := checkFieldName(f.Name); err != nil {
		return err
	}
	if ClaimsIdentity(f.Name) {
		return fmt.Errorf("header %s claims an identity; only TLS says who the caller is", f.Name)
	}
	if len(f.Value) > maxResponseField || !utf8.ValidString(f.Value) ||
		strings.ContainsFunc(f.Value, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
		return fmt.Errorf("header %s has a value that cannot be sent", f.Name)
	}
	return nil
}

// framing are the fields that say where a message ends, or that belong to one
// connection.
var framing = []string{
	"connection", "content-length", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
	"x-decision-id",
}

func checkFieldName(name string) error {
	token := name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") == ""
	switch {
	case !token || len(name) > maxResponseField:
		return fmt.Errorf("%.100q is no name of a header", name)
	case slices.Contains(framing, name), strings.HasPrefix(name, "grpc-"), strings.HasSuffix(name, "-bin"):
		return fmt.Errorf("header %s is not a policy's to set or remove", name)
	}
	return nil
}

// ClaimsIdentity says whether a header field of this name, in lower case, claims an
// identity. Only TLS says who the caller is (attack T13). Underscores count as
// hyphens: CGI and its descendants make them the same.
func ClaimsIdentity(name string) bool {
	switch strings.ReplaceAll(name, "_", "-") {
	case "x-spiffe-id", "x-forwarded-client-cert":
		return true
	}
	return false
}

// Replaces says whether the request of a call that is allowed must not have the
// caller's header field name any more. Case does not matter, and underscores count
// as hyphens.
func (r *Response) Replaces(name string) bool {
	same := func(other string) bool {
		return strings.EqualFold(strings.ReplaceAll(name, "_", "-"), strings.ReplaceAll(other, "_", "-"))
	}
	return slices.ContainsFunc(r.RemoveHeaders, same) ||
		slices.ContainsFunc(r.Headers, func(f HeaderField) bool { return same(f.Name) })
}

// Size is about how many bytes r takes.
func (r *Response) Size() int {
	if r == nil {
		return 0
	}
	n := len(r.Body)
	for _, fields := range [][]HeaderField{r.Headers, r.ResponseHeaders} {
		for _, f := range fields {
			n += len(f.Name) + len(f.Value)
		}
	}
	for _, name := range r.RemoveHeaders {
		n += len(name)
	}
	return n
}

// Equal says whether r and o send the same; either may be nil.
func (r *Response) Equal(o *Response) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.Status == o.Status && r.Body == o.Body && slices.Equal(r.Headers, o.Headers) &&
		slices.Equal(r.ResponseHeaders, o.ResponseHeaders) && slices.Equal(r.RemoveHeaders, o.RemoveHeaders)
}

// DenialStatus is the HTTP status of the denial d.
func (d Decision) DenialStatus() int {
	switch {
	case d.Reason == BadRequest:
		return 400
	case d.Response != nil && d.Response.Status != 0:
		return d.Response.Status
	}
	return 403
}
