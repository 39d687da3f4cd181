package audit

// One line of the log:
//
//	{"seq":7,"prev":"HASH","time":…,"type":…,…,"hash":"HASH"}
//
// hash is the SHA-256, in hex, of all bytes of the line before `,"hash":`, so
// that it can be checked without decoding and encoding again; prev is the hash
// of the line before, zeros in the first. A line is printable ASCII whatever
// the record holds, so that no record can look like another (attack T36), in
// a terminal neither.

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

const (
	// maxField bounds each string of a record, in bytes: what is longer is
	// cut, for a record must not be lost over an attacker's long text. A
	// SPIFFE ID (2048 bytes) is never cut, unless much else in the record is
	// long, too: a bundle of the tree holds lines of at most 64 KiB.
	maxField = 4 << 10
	longMax  = 1 << 10
	maxBody  = 63 << 10
	cutMark  = " [cut]"
	// maxLine is more than a body and its place in the chain.
	maxLine = 64 << 10

	hashDigits = 2 * sha256.Size
	hashMember = `,"hash":"`
	tailLength = len(hashMember) + hashDigits + len(`"}`)
)

// link is the place in the chain after a line.
type link struct {
	seq  uint64
	hash [sha256.Size]byte
}

// append writes the line of the record that follows l, and returns its link.
func (l link) append(buf *bytes.Buffer, body []byte) link {
	start := buf.Len()
	line := append(buf.AvailableBuffer(), `{"seq":`...)
	line = strconv.AppendUint(line, l.seq+1, 10)
	line = append(line, `,"prev":"`...)
	line = hex.AppendEncode(line, l.hash[:])
	line = append(line, `",`...)
	line = append(line, body[1:len(body)-1]...) // without its braces
	buf.Write(line)
	next := link{seq: l.seq + 1, hash: sha256.Sum256(buf.Bytes()[start:])}
	buf.WriteString(hashMember)
	buf.Write(hex.AppendEncode(buf.AvailableBuffer(), next.hash[:]))
	buf.WriteString("\"}\n")
	return next
}

// encode returns the record's own JSON object, in ASCII.
func (r Record) encode(now time.Time) ([]byte, error) {
	if r.Type == "" {
		return nil, errors.New("no type")
	}
	if r.Time.IsZero() {
		r.Time = now
	}
	r.Time, r.NotAfter = r.Time.UTC(), r.NotAfter.UTC()
	body, err := r.encodeCut(maxField)
	if err == nil && len(body) > maxBody {
		return r.encodeCut(longMax)
	}
	return body, err
}

func (r Record) encodeCut(at int) ([]byte, error) {
	r.Type = Type(cut(string(r.Type), at))
	for _, field := range []*string{&r.Actor, &r.Role, &r.ProposedBy, &r.SPIFFEID, &r.EntryID, &r.Serial, &r.AuthorityID, &r.SignedHash, &r.Detail, &r.Reason, &r.Act} {
		*field = cut(*field, at)
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	return asciiJSON(b), nil
}

// cut shortens s to so many bytes, between two runes.
func cut(s string, at int) string {
	if len(s) <= at {
		return s
	}
	end := at - len(cutMark)
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + cutMark
}

// asciiJSON escapes what encoding/json leaves as it is: DEL, the C1 controls
// (U+009B begins a terminal sequence as ESC does) and all beyond.
func asciiJSON(b []byte) []byte {
	i := slices.IndexFunc(b, func(c byte) bool { return c >= 0x7f }) // bytes: this is on the way of every issuance
	if i < 0 {
		return b
	}
	out := append(make([]byte, 0, 2*len(b)), b[:i]...)
	for _, r := range string(b[i:]) {
		switch {
		case r < 0x7f:
			out = append(out, byte(r))
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			out = fmt.Appendf(out, `\u%04x\u%04x`, high, low)
		default:
			out = fmt.Appendf(out, `\u%04x`, r)
		}
	}
	return out
}

// header is what a line says about its place.
type header struct {
	Seq            uint64    `json:"seq"`
	Prev           string    `json:"prev"`
	Hash           string    `json:"hash"`
	Time           time.Time `json:"time"`
	Type           Type      `json:"type"`
	DroppedThrough uint64    `json:"dropped_through"`
	CheckpointSize uint64    `json:"checkpoint_size"`
	Actor          string    `json:"actor"`
	Detail         string    `json:"detail"`
	Act            string    `json:"act"`
	Pending        bool      `json:"pending"`
}

// uncounted: the log has less of a checkpoint than h says that it had.
func (h header) uncounted(counted int64) error {
	return badError(fmt.Sprintf("a checkpoint of %d records was saved before it, and the one that is there counts %d: it was taken away or put back", h.CheckpointSize, counted))
}

// parseLine checks a line, without its newline, against its own hash.
func parseLine(line []byte) (h header, own link, err error) {
	if len(line) < tailLength {
		return h, own, badError("not a record")
	}
	body := line[:len(line)-tailLength]
	own.hash = sha256.Sum256(body)
	want := hashMember + hex.EncodeToString(own.hash[:]) + `"}`
	// What the line says decides about its name in the report, even when its
	// hash does not fit.
	jsonErr := json.Unmarshal(line, &h)
	own.seq = h.Seq
	switch {
	case string(line[len(body):]) != want:
		return h, own, badError("its hash does not match what it says")
	case jsonErr != nil || h.Type == "":
		return h, own, badError("not a record")
	}
	return h, own, nil
}

// follows checks that the line comes right after the link before.
func (h header) follows(before link) error {
	if h.Seq != before.seq+1 {
		return badError(fmt.Sprintf("it should have seq %d: records are missing, doubled or out of order", before.seq+1))
	}
	if h.Prev != hex.EncodeToString(before.hash[:]) {
		return badError("its prev is not the hash of the line before")
	}
	return nil
}

// badError is why a line is refused.
type badError string

func (e badError) Error() string { return string(e) }
