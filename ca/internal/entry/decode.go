// Reading stored entries fast: a CA with a million of them reads them all
// before it is ready. What Encode writes has one shape; bytes of exactly that
// shape are cut up in place, and everything else goes the long way through
// encoding/json. Both give the same entry.

package entry

import (
	"encoding/json"
	"fmt"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"merlon.dev/ca/internal/role"
)

// maxParents bounds what a Decoder remembers.
const maxParents = 100_000

// Decoder reads what Encode wrote, entry after entry, and keeps once what
// repeats. The zero value is ready. It is not safe for concurrent use.
type Decoder struct {
	parents map[string]spiffeid.ID
	text    []byte  // scratch: the strings of one entry, one after the other
	lens    []int32 // their lengths
}

// Decode reads what Encode wrote. Bytes of a newer version are an error: what
// an unknown field would have narrowed must not be widened by ignoring it.
func Decode(b []byte) (*Entry, error) { return new(Decoder).Decode(b) }

// Decode is the function Decode.
func (d *Decoder) Decode(b []byte) (*Entry, error) {
	if e := d.cut(b); e != nil {
		return e, nil
	}
	return decodeJSON(b)
}

func decodeJSON(b []byte) (*Entry, error) {
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("decode registration entry: %w", err)
	}
	if s.Version > deliveryVersion {
		return nil, fmt.Errorf("decode registration entry %q: version %d: %w, which writes %d", s.ID, s.Version, ErrNewer, deliveryVersion)
	}
	if s.Version < encodingVersion {
		return nil, fmt.Errorf("decode registration entry %q: version %d is not known; this Merlon writes %d", s.ID, s.Version, encodingVersion)
	}
	e := &Entry{
		ID: s.ID, SPIFFEID: s.SPIFFEID, ParentID: s.ParentID,
		X509SVIDTTL: time.Duration(s.X509SVIDTTL), JWTSVIDTTL: time.Duration(s.JWTSVIDTTL),
		DNSNames: s.DNSNames, CommonName: s.CommonName, Hint: s.Hint, KeyDelivery: s.KeyDelivery, FederatesWith: s.FederatesWith,
		ExpiresAt: s.ExpiresAt, CreatedAt: s.CreatedAt,
	}
	if err := e.setRole(s.Admin, s.Role, s.RolePrefix); err != nil {
		return nil, fmt.Errorf("decode registration entry %s: %w", s.ID, err)
	}
	if err := checkKeyDelivery(e.KeyDelivery); err != nil {
		return nil, fmt.Errorf("decode registration entry %s: %w", s.ID, err)
	}
	for _, text := range s.Selectors {
		sel, err := parseSelector(e.known(), text)
		if err != nil {
			return nil, fmt.Errorf("decode registration entry %s: %w", s.ID, err)
		}
		e.Selectors = append(e.Selectors, sel)
	}
	return e, nil
}

// cut reads b if it has exactly the shape that Encode writes, without escapes;
// nil otherwise. The entry's strings share one allocation.
func (d *Decoder) cut(b []byte) *Entry {
	c := cursor{rest: b}
	d.text, d.lens = d.text[:0], d.lens[:0]
	e := &Entry{}
	if !c.has(`{"v":2,"id":"`) {
		c.want(`{"v":1,"id":"`)
	}
	d.keep(c.text())
	c.want(`,"spiffe_id":"`)
	d.keep(c.text())
	c.want(`,"parent_id":"`)
	parent := c.text()
	c.want(`,"selectors":["`)
	selectors := d.keepList(&c)
	if c.has(`,"x509_svid_ttl_ns":`) {
		e.X509SVIDTTL = time.Duration(c.number())
	}
	if c.has(`,"jwt_svid_ttl_ns":`) {
		e.JWTSVIDTTL = time.Duration(c.number())
	}
	names := 0
	if c.has(`,"dns_names":["`) {
		names = d.keepList(&c)
	}
	commonName := c.has(`,"common_name":"`)
	if commonName {
		d.keep(c.text())
	}
	hint := c.has(`,"hint":"`)
	if hint {
		d.keep(c.text())
	}
	if c.has(`,"key_delivery":"`) {
		e.KeyDelivery = KeyDelivery(c.text())
	}
	federated := 0
	if c.has(`,"federates_with":["`) {
		federated = d.keepList(&c)
	}
	operator := c.has(`,"admin":true`)
	var name, prefix string
	if c.has(`,"role":"`) { // few have one
		name = string(c.text())
	}
	if c.has(`,"role_prefix":"`) {
		prefix = string(c.text())
	}
	if c.has(`,"expires_at":`) {
		e.ExpiresAt = c.time()
	}
	if c.has(`,"created_at":`) {
		e.CreatedAt = c.time()
	}
	c.want(`}`)
	if c.odd || len(c.rest) > 0 {
		return nil
	}
	if e.setRole(operator, role.Name(name), prefix) != nil || checkKeyDelivery(e.KeyDelivery) != nil {
		return nil
	}
	p := pieces{text: string(d.text), lens: d.lens}
	e.ID = p.next()
	var err error
	if e.SPIFFEID, err = spiffeid.FromString(p.next()); err != nil {
		return nil
	}
	if e.ParentID, err = d.parent(parent); err != nil {
		return nil
	}
	e.Selectors = make([]Selector, selectors)
	known := e.known()
	for i := range e.Selectors {
		if e.Selectors[i], err = parseSelector(known, p.next()); err != nil {
			return nil
		}
	}
	for range names {
		e.DNSNames = append(e.DNSNames, p.next())
	}
	if commonName {
		e.CommonName = p.next()
	}
	if hint {
		e.Hint = p.next()
	}
	for range federated {
		e.FederatesWith = append(e.FederatesWith, p.next())
	}
	return e
}

// setRole takes over the role of a stored entry. One that does not hold together
// is an error: the entry would say something else than was meant.
func (e *Entry) setRole(operator bool, name role.Name, prefix string) error {
	r := role.Role{Name: name, Prefix: prefix}
	if operator && r != (role.Role{}) {
		return fmt.Errorf("it is for an admin and for a %s", r)
	}
	if operator {
		r.Name = role.Operator
	}
	if err := checkRole(r); err != nil {
		return err
	}
	e.Role = r
	return nil
}

// keep copies one string of the entry.
func (d *Decoder) keep(b []byte) {
	d.text = append(d.text, b...)
	d.lens = append(d.lens, int32(len(b)))
}

// keepList keeps the strings of a list whose first quote has been read, and
// counts them.
func (d *Decoder) keepList(c *cursor) (n int) {
	for {
		d.keep(c.text())
		n++
		if !c.has(`,"`) {
			c.want(`]`)
			return n
		}
	}
}

// parent returns the ID of an agent; many entries share one.
func (d *Decoder) parent(b []byte) (spiffeid.ID, error) {
	if id, ok := d.parents[string(b)]; ok {
		return id, nil
	}
	id, err := spiffeid.FromString(string(b))
	if err != nil {
		return id, err
	}
	if d.parents == nil || len(d.parents) >= maxParents {
		d.parents = make(map[string]spiffeid.ID)
	}
	d.parents[id.String()] = id
	return id, nil
}

// pieces gives back what was kept, in order.
type pieces struct {
	text string
	lens []int32
}

func (p *pieces) next() string {
	n := p.lens[0]
	s := p.text[:n]
	p.text, p.lens = p.text[n:], p.lens[1:]
	return s
}

// cursor reads from the front of rest; odd is set by what was not expected.
type cursor struct {
	rest []byte
	odd  bool
}

// has skips literal if it comes next.
func (c *cursor) has(literal string) bool {
	if len(c.rest) < len(literal) || string(c.rest[:len(literal)]) != literal {
		return false
	}
	c.rest = c.rest[len(literal):]
	return true
}

func (c *cursor) want(literal string) {
	if !c.has(literal) {
		c.odd = true
	}
}

// text reads up to the closing quote: printable ASCII without escapes.
func (c *cursor) text() []byte {
	for i, ch := range c.rest {
		switch {
		case ch == '"':
			s := c.rest[:i]
			c.rest = c.rest[i+1:]
			return s
		case ch < ' ' || ch > '~' || ch == '\\':
			c.odd = true
			return nil
		}
	}
	c.odd = true
	return nil
}

// number reads what json writes for an integer that is not 0.
func (c *cursor) number() int64 {
	i := 0
	for i < len(c.rest) && (c.rest[i] == '-' || c.rest[i]-'0' <= 9) {
		i++
	}
	text := string(c.rest[:i])
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || strconv.FormatInt(n, 10) != text {
		c.odd = true
	}
	c.rest = c.rest[i:]
	return n
}

// time reads a quoted time in UTC.
func (c *cursor) time() (t time.Time) {
	quoted := c.rest
	c.want(`"`)
	text := c.text()
	if c.odd || t.UnmarshalJSON(quoted[:len(text)+2]) != nil {
		c.odd = true
	}
	return t
}
