package decisionlog

// This file is one decision in a fixed number of bytes. What it says of source,
// destination, rule and reason is the row that counts it; the other texts are
// copied, the most telling first, and cut where there is no more room.

import (
	"slices"
	"strings"
	"time"

	"merlon.dev/policy"
)

// Fields is a set of the parts of a call that can be incomplete in a record.
type Fields uint16

// The parts, in the order in which room is given to them.
const (
	SourceID Fields = 1 << iota
	DestinationID
	RuleID
	Serial
	DryRun
	Method
	SourceAddress
	DestinationAddress
	Host
	Path
	Query
	Headers
	JWT // the claims of a JWT-SVID, which are never in a record
)

// names are those of the parts, by bit.
var names = [...]string{
	"source", "destination", "rule_id", "source_serial", "dry_run", "method", "source_address", "destination_address",
	"host", "path", "query", "headers", "jwt",
}

// Names are the names of the parts in f.
func (f Fields) Names() []string {
	var all []string
	for i, name := range names {
		if f&(1<<i) != 0 {
			all = append(all, name)
		}
	}
	return all
}

// FieldsNamed is the set of parts with these names; unknown ones are left out.
func FieldsNamed(all []string) (f Fields) {
	for i, name := range names {
		if slices.Contains(all, name) {
			f |= 1 << i
		}
	}
	return f
}

const (
	textBytes = 928 // with all else a record has some 1000 bytes
	texts     = len(names) - 2
)

// limits are how many bytes each text may take of the room, by bit. Those before
// the path leave it 200 bytes at the least, and 500 where source, destination and
// rule are in the row.
var limits = [texts]int{128, 128, 64, 40, 128, 24, 56, 56, 96, textBytes, textBytes}

var masked = []string{"(masked)"}

// SecretHeader says whether the value of the header called name, in lower case, is
// never in a record: it is a secret by its meaning (SECURITY.md T37). That there was
// one is.
func SecretHeader(name string) bool {
	switch name { // looked up by length first; a list costs a record with ten headers 25 ns
	case "authorization", "proxy-authorization", "cookie", "set-cookie", "x-api-key":
		return true
	}
	return false
}

// Record is one decision.
type Record struct {
	row        *Row
	id         policy.DecisionID
	allow      bool
	letThrough bool
	protocol   policy.Protocol // one of three constants, so nothing is kept alive
	revision   uint64
	at         int64
	standsFor  uint64
	incomplete Fields
	ends       [texts]uint16
	headers    uint16 // where they end
	text       [textBytes]byte
}

// set fills rec, whatever it held.
func (rec *Record) set(row *Row, in *policy.Input, d *policy.Decision, at int64, standsFor uint64, incomplete Fields) {
	rec.row, rec.id, rec.allow, rec.revision, rec.at = row, d.DecisionID, d.Allow, d.Revision, at
	rec.standsFor, rec.incomplete, rec.protocol, rec.letThrough = standsFor, incomplete, known(in.Protocol), d.LetThrough
	if in.JWT != nil {
		rec.incomplete |= JWT
	}
	n := 0
	if row.other { // else the row has them
		n = rec.put(0, n, in.Source)
		n = rec.put(1, n, in.Destination)
		n = rec.put(2, n, d.RuleID)
	} else {
		rec.ends[0], rec.ends[1], rec.ends[2] = 0, 0, 0
	}
	n = rec.put(3, n, in.SourceSerial)
	n = rec.putList(4, n, d.DryRun)
	n = rec.put(5, n, in.Method)
	n = rec.put(6, n, in.SourceAddress)
	n = rec.put(7, n, in.DestinationAddress)
	n = rec.put(8, n, in.Host)
	n = rec.put(9, n, in.Path)
	n = rec.put(10, n, in.Query)
	rec.headers = uint16(rec.putHeaders(n, in.Headers))
}

// known is p as a constant of this package's, so that no text of a caller stays.
func known(p policy.Protocol) policy.Protocol {
	switch p {
	case policy.HTTP:
		return policy.HTTP
	case policy.GRPC:
		return policy.GRPC
	case policy.TCP:
		return policy.TCP
	}
	return ""
}

// put copies s as text i to n, as far as there is room, and returns the end.
func (rec *Record) put(i, n int, s string) int {
	room := min(limits[i], textBytes-n)
	if len(s) > room {
		s = s[:room]
		rec.incomplete |= 1 << i
	}
	n += copy(rec.text[n:], s)
	rec.ends[i] = uint16(n)
	return n
}

// putList copies texts that have no "\n" in them, whole ones only.
func (rec *Record) putList(i, n int, list []string) int {
	begin := n
	for k, s := range list {
		if n-begin+len(s)+1 > limits[i] {
			rec.incomplete |= 1 << i
			break
		}
		if k > 0 {
			n += copy(rec.text[n:], "\n")
		}
		n += copy(rec.text[n:], s)
	}
	rec.ends[i] = uint16(n)
	return n
}

// putHeaders copies headers, whole ones only: each name and value with its length in
// two bytes in front.
func (rec *Record) putHeaders(n int, headers policy.Headers) int {
	switch h := headers.(type) {
	case nil:
	case policy.HeaderMap: // without an iterator, which allocates
		for name, values := range h {
			n = rec.putHeader(n, name, values)
		}
	default:
		return rec.putFields(n, h)
	}
	return n
}

// putFields is apart, so that only records of headers that are no map allocate.
func (rec *Record) putFields(n int, headers policy.Headers) int {
	for name, values := range headers.All() {
		n = rec.putHeader(n, name, values)
	}
	return n
}

func (rec *Record) putHeader(n int, name string, values []string) int {
	if SecretHeader(name) {
		values = masked
		rec.incomplete |= Headers
	}
	size := 0
	for _, v := range values {
		size += 4 + len(name) + len(v)
	}
	if n+size > textBytes {
		rec.incomplete |= Headers
		return n
	}
	for _, v := range values {
		n = putSized(&rec.text, putSized(&rec.text, n, name), v)
	}
	return n
}

func putSized(text *[textBytes]byte, n int, s string) int {
	to := text[n : n+2+len(s)]
	to[0], to[1] = byte(len(s)>>8), byte(len(s))
	return n + 2 + copy(to[2:], s)
}

func (rec *Record) get(i int) string {
	begin := uint16(0)
	if i > 0 {
		begin = rec.ends[i-1]
	}
	return valid(rec.text[begin:rec.ends[i]])
}

// valid is b without what is no UTF-8: part of a character at the end of a text
// that was cut, and whatever a caller sent that was refused for it.
func valid(b []byte) string { return strings.ToValidUTF8(string(b), "\uFFFD") }

// Input is the call, in a copy of its own.
func (rec *Record) Input() *policy.Input {
	in := &policy.Input{
		Source: rec.row.Source, Destination: rec.row.Destination, Protocol: rec.protocol, SourceSerial: rec.get(3), Method: rec.get(5),
		SourceAddress: rec.get(6), DestinationAddress: rec.get(7), Host: rec.get(8), Path: rec.get(9), Query: rec.get(10),
	}
	if rec.row.other {
		in.Source, in.Destination = rec.get(0), rec.get(1)
	}
	var headers policy.HeaderMap
	for n := int(rec.ends[texts-1]); n < int(rec.headers); {
		var name, value string
		name, n = rec.getSized(n)
		value, n = rec.getSized(n)
		if headers == nil {
			headers = policy.HeaderMap{}
			in.Headers = headers
		}
		headers[name] = append(headers[name], value)
	}
	return in
}

func (rec *Record) getSized(n int) (string, int) {
	end := n + 2 + int(rec.text[n])<<8 + int(rec.text[n+1])
	return valid(rec.text[n+2 : end]), end
}

// Decision is what was decided, in a copy of its own.
func (rec *Record) Decision() policy.Decision {
	d := policy.Decision{
		Allow: rec.allow, LetThrough: rec.letThrough, Reason: policy.Reason(rec.row.Reason), RuleID: rec.row.RuleID, DecisionID: rec.id, Revision: rec.revision,
	}
	if rec.row.other {
		d.RuleID = rec.get(2)
	}
	if list := rec.get(4); list != "" {
		d.DryRun = strings.Split(list, "\n")
	}
	return d
}

// At is when it was decided.
func (rec *Record) At() time.Time { return time.Unix(0, rec.at) }

// StandsFor is how many allowed calls the record stands for, itself included: all
// since the one that was kept before it. 1 for all that are always kept.
func (rec *Record) StandsFor() uint64 { return rec.standsFor }

// Incomplete is what of the call is not in the record, or only in part.
func (rec *Record) Incomplete() Fields { return rec.incomplete }
