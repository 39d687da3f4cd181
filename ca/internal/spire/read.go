// Reading what `spire-server entry show -output json` prints. A key that is not
// known is remembered with its entry: it may narrow who the entry is for.

package spire

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"merlon.dev/ca/internal/entry"
)

// shown is an entry as SPIRE shows it.
type shown struct {
	line               int
	id                 string
	spiffeID, parentID string
	selectors          []entry.Selector
	x509TTL, jwtTTL    int64 // seconds
	ttl                int64 // of both, before SPIRE 1.5
	federatesWith      []string
	dnsNames           []string
	hint               string
	admin, downstream  bool
	storeSVID          bool
	expiresAt          int64 // of the epoch; 0 for never
	unknown            []string
	broken             []string // values that are none
}

// readShown reads all of them. Errors name the line.
func readShown(file string, data []byte) ([]shown, error) {
	if len(data) > MaxBytes {
		return nil, fmt.Errorf("read %s: it has more than %d bytes", file, MaxBytes)
	}
	r := &reader{file: file, data: data, dec: json.NewDecoder(bytes.NewReader(data))}
	if err := r.document(); err != nil {
		return nil, err
	}
	return r.entries, nil
}

// reader walks one document. It is used once.
type reader struct {
	file    string
	data    []byte
	dec     *json.Decoder
	entries []shown
	// line is that of byte counted.
	line, counted int
}

// here is the line of the next value.
func (r *reader) here() int {
	at := int(r.dec.InputOffset())
	for at < len(r.data) && strings.IndexByte(" \t\r\n,:", r.data[at]) >= 0 {
		at++
	}
	if at > r.counted {
		r.line += bytes.Count(r.data[r.counted:at], []byte("\n"))
		r.counted = at
	}
	return r.line + 1
}

func (r *reader) fail(line int, format string, args ...any) error {
	return fmt.Errorf("read %s:%d: %s", r.file, line, printable(fmt.Sprintf(format, args...)))
}

// document reads {"entries": […], "next_page_token": ""} and nothing behind it.
func (r *reader) document() error {
	if err := r.delim('{', "want the object that `spire-server entry show -output json` prints"); err != nil {
		return err
	}
	var seen []string
	for r.dec.More() {
		line := r.here()
		token, err := r.dec.Token()
		if err != nil {
			return r.fail(line, "%v", err)
		}
		key, _ := token.(string)
		if slices.Contains(seen, key) {
			return r.fail(line, "%q is there twice", key)
		}
		seen = append(seen, key)
		if err := r.member(line, key); err != nil {
			return err
		}
	}
	if _, err := r.dec.Token(); err != nil {
		return r.fail(r.here(), "%v", err)
	}
	if !slices.Contains(seen, "entries") {
		return r.fail(1, "there is no \"entries\": want what `spire-server entry show -output json` prints")
	}
	if _, err := r.dec.Token(); err != io.EOF {
		return r.fail(r.here(), "there is something behind the object")
	}
	return nil
}

func (r *reader) member(line int, key string) error {
	switch key {
	case "entries":
		return r.list()
	case "next_page_token":
		var token string
		if err := r.dec.Decode(&token); err != nil {
			return r.fail(line, "next_page_token: %v", err)
		}
		if token != "" {
			return r.fail(line, "next_page_token is set: this is one page of the entries; have spire-server entry show print all")
		}
		return nil
	}
	return r.fail(line, "unknown key %q: want what `spire-server entry show -output json` prints", key)
}

func (r *reader) delim(want json.Delim, hint string) error {
	line := r.here()
	token, err := r.dec.Token()
	if err != nil {
		return r.fail(line, "%s: %v", hint, err)
	}
	if token != want {
		return r.fail(line, "%s", hint)
	}
	return nil
}

func (r *reader) list() error {
	if err := r.delim('[', "entries: want a list"); err != nil {
		return err
	}
	for r.dec.More() {
		line := r.here()
		var raw json.RawMessage
		if err := r.dec.Decode(&raw); err != nil {
			return r.fail(line, "%v", err)
		}
		e, err := readOne(raw)
		if err != nil {
			return r.fail(line, "entry %d: %v", len(r.entries)+1, err)
		}
		e.line = line
		r.entries = append(r.entries, e)
	}
	if _, err := r.dec.Token(); err != nil {
		return r.fail(r.here(), "%v", err)
	}
	return nil
}

// readOne reads one entry. A value that is none costs this entry alone, which is then
// named and not made; what is no object, or has a key twice, is no list of entries.
func readOne(raw []byte) (shown, error) {
	var e shown
	err := members(raw, func(key string, value json.RawMessage) error {
		into := e.field(key)
		if into == nil {
			if !emptyValue(value) {
				e.unknown = append(e.unknown, key)
			}
			return nil
		}
		if err := json.Unmarshal(value, into); err != nil {
			e.broken = append(e.broken, fmt.Sprintf("%s: %v", key, err))
		}
		return nil
	})
	slices.Sort(e.unknown)
	e.x509TTL, e.jwtTTL = cmp.Or(e.x509TTL, e.ttl), cmp.Or(e.jwtTTL, e.ttl)
	return e, err
}

// field is where the value of key goes; nil where there is no such key.
func (e *shown) field(key string) any {
	switch key {
	case "id":
		return &e.id
	case "spiffe_id":
		return (*shownID)(&e.spiffeID)
	case "parent_id":
		return (*shownID)(&e.parentID)
	case "selectors":
		return (*shownSelectors)(&e.selectors)
	case "ttl":
		return (*shownInt)(&e.ttl)
	case "x509_svid_ttl":
		return (*shownInt)(&e.x509TTL)
	case "jwt_svid_ttl":
		return (*shownInt)(&e.jwtTTL)
	case "federates_with":
		return &e.federatesWith
	case "dns_names":
		return &e.dnsNames
	case "hint":
		return &e.hint
	case "admin":
		return &e.admin
	case "downstream":
		return &e.downstream
	case "store_svid":
		return &e.storeSVID
	case "expires_at":
		return (*shownInt)(&e.expiresAt)
	case "revision_number", "created_at", "entry_version": // say nothing of whom it is for
		return new(json.RawMessage)
	}
	return nil
}

// members calls do for each key of an object, in any order, and refuses a key that
// is there twice: which of the two counts would be a guess.
func members(raw []byte, do func(key string, value json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if token, err := dec.Token(); err != nil || token != json.Delim('{') {
		return fmt.Errorf("want an object")
	}
	seen := make(map[string]bool)
	for dec.More() {
		token, err := dec.Token()
		if err != nil {
			return err
		}
		key, _ := token.(string)
		if seen[key] {
			return fmt.Errorf("%q is there twice", key)
		}
		seen[key] = true
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return err
		}
		if err := do(key, value); err != nil {
			return err
		}
	}
	return nil
}

// emptyValue is one that protobuf's JSON prints of a field that is not set.
func emptyValue(value json.RawMessage) bool {
	switch string(bytes.Join(bytes.Fields(value), nil)) {
	case "null", "false", "0", `"0"`, `""`, "[]", "{}":
		return true
	}
	return false
}

// shownID is {"trust_domain": "example.org", "path": "/web"}.
type shownID string

// UnmarshalJSON implements json.Unmarshaler.
func (id *shownID) UnmarshalJSON(raw []byte) error {
	var td, path string
	err := members(raw, func(key string, value json.RawMessage) error {
		switch key {
		case "trust_domain":
			return json.Unmarshal(value, &td)
		case "path":
			return json.Unmarshal(value, &path)
		}
		return fmt.Errorf("unknown key %q", key)
	})
	*id = shownID("spiffe://" + td + path)
	return err
}

// shownSelectors is [{"type": "unix", "value": "uid:1000"}].
type shownSelectors []entry.Selector

// UnmarshalJSON implements json.Unmarshaler.
func (s *shownSelectors) UnmarshalJSON(raw []byte) error {
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil {
		return err
	}
	for _, item := range list {
		var sel entry.Selector
		err := members(item, func(key string, value json.RawMessage) error {
			switch key {
			case "type":
				return json.Unmarshal(value, &sel.Type)
			case "value":
				return json.Unmarshal(value, &sel.Value)
			}
			return fmt.Errorf("unknown key %q", key)
		})
		if err != nil {
			return err
		}
		*s = append(*s, sel)
	}
	return nil
}

// shownInt is a number: of 64 bits in a string, of 32 bits without.
type shownInt int64

// UnmarshalJSON implements json.Unmarshaler.
func (n *shownInt) UnmarshalJSON(raw []byte) error {
	text := strings.Trim(string(raw), `"`)
	v, err := strconv.ParseInt(text, 10, 64)
	if err != nil || v < 0 {
		return fmt.Errorf("%q is not a number", text)
	}
	*n = shownInt(v)
	return nil
}

// end is when the entry ends; zero for never.
func (e *shown) end() time.Time {
	if e.expiresAt == 0 {
		return time.Time{}
	}
	return time.Unix(e.expiresAt, 0).UTC()
}

// name is the entry for people.
func (e *shown) name() string {
	if e.id == "" {
		return "entry for " + e.spiffeID
	}
	return "entry " + e.id + " for " + e.spiffeID
}
