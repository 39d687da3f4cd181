// A signed message of PKCS #7 (RFC 2315, RFC 5652), taken apart into what is
// signed and the signature over it. Nothing is verified: that is the CA's, which
// for that need not read such messages. Amazon writes them in BER with lengths
// left open, so that is read, too.

package attest

import (
	"bytes"
	"errors"
	"fmt"
)

// signedMessage is the content with the one signature over it.
type signedMessage struct {
	content []byte
	// attributes are the signed ones, as they are signed: SET OF, DER.
	attributes []byte
	signature  []byte
}

// Identifiers of the elements that there are in such a message.
const (
	berInteger           = 0x02
	berOctets            = 0x04
	berOID               = 0x06
	berOctetsConstructed = 0x24
	berSequence          = 0x30
	berSet               = 0x31
	berContext0          = 0xa0
	berContext1          = 0xa1

	constructed  = 0x20
	highTag      = 0x1f
	openLength   = 0x80
	maxBERDepth  = 12 // signed attributes of Amazon's are 9 deep
	maxBERLength = 4  // bytes of a length
)

// What the message has to be, and its content: pkcs7-signedData and pkcs7-data.
var (
	signedDataOID = []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x02}
	dataOID       = []byte{0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01}
)

var errNotBER = errors.New("it is not in BER")

// openSigned takes a message with one signer and signed attributes apart.
func openSigned(message []byte) (*signedMessage, error) {
	outer := parts{rest: message}
	info := outer.inside(berSequence)
	info.is(berOID, signedDataOID)
	wrapped := info.inside(berContext0)
	data := wrapped.inside(berSequence)
	data.next(berInteger)
	data.next(berSet) // digest algorithms
	inner := data.inside(berSequence)
	inner.is(berOID, dataOID)
	held := inner.inside(berContext0)
	s := &signedMessage{content: held.octets()}
	data.skip(berContext0) // certificates
	data.skip(berContext1) // revocation lists
	signers := data.inside(berSet)
	signer := signers.inside(berSequence)
	signer.next(berInteger)
	signer.next(berSequence) // issuer and serial number
	signer.next(berSequence) // digest algorithm
	s.attributes = asSet(signer.next(berContext0))
	signer.next(berSequence) // signature algorithm
	s.signature = signer.octets()
	signer.skip(berContext1) // what is not signed
	for _, p := range []*parts{&held, &signer, &signers, &inner, &data, &wrapped, &info, &outer} {
		if err := p.end(); err != nil {
			return nil, fmt.Errorf("it is no PKCS #7 message with its content, one signer and signed attributes: %w", err)
		}
	}
	return s, nil
}

// parts reads elements in order. The first that is not as wanted is an error that
// stays; what is read after it is empty.
type parts struct {
	rest []byte
	err  error
}

// next reads an element and returns what is in it.
func (p *parts) next(tag byte) []byte {
	if p.err != nil {
		return nil
	}
	found, body, rest, err := element(p.rest, 0)
	if err == nil && found != tag {
		err = fmt.Errorf("element 0x%02x is not there, but 0x%02x", tag, found)
	}
	if err != nil {
		p.err, p.rest = err, nil
		return nil
	}
	p.rest = rest
	return body
}

// inside reads an element of elements. Its error is found in both.
func (p *parts) inside(tag byte) parts {
	body := p.next(tag)
	return parts{rest: body, err: p.err}
}

// skip passes over an element that may be missing.
func (p *parts) skip(tag byte) {
	if len(p.rest) > 0 && p.rest[0] == tag {
		p.next(tag)
	}
}

// is reads an element that is known.
func (p *parts) is(tag byte, want []byte) {
	if got := p.next(tag); p.err == nil && !bytes.Equal(got, want) {
		p.err, p.rest = errors.New("it is another kind of message, or of content"), nil
	}
}

// octets reads a string of bytes, which BER may have cut into pieces.
func (p *parts) octets() []byte {
	if len(p.rest) == 0 || p.rest[0] != berOctetsConstructed {
		return p.next(berOctets)
	}
	pieces := p.inside(berOctetsConstructed)
	var whole []byte
	for len(pieces.rest) > 0 {
		whole = append(whole, pieces.next(berOctets)...)
	}
	if pieces.err != nil {
		p.err, p.rest = pieces.err, nil
	}
	return whole
}

// end wants everything to have been read.
func (p *parts) end() error {
	if p.err == nil && len(p.rest) > 0 {
		return fmt.Errorf("%d bytes follow", len(p.rest))
	}
	return p.err
}

// element reads the first of b: its tag, what is in it, and what follows.
func element(b []byte, depth int) (tag byte, body, rest []byte, err error) {
	if depth > maxBERDepth || len(b) < 2 || b[0]&highTag == highTag {
		return 0, nil, nil, errNotBER
	}
	tag, rest = b[0], b[2:]
	length := int(b[1])
	if b[1] == openLength {
		body, rest, err = untilEnd(tag, rest, depth)
		return tag, body, rest, err
	}
	if n := length & 0x7f; length > openLength {
		if n > maxBERLength || n > len(rest) {
			return 0, nil, nil, errNotBER
		}
		length = 0
		for _, digit := range rest[:n] {
			length = length<<8 | int(digit)
		}
		rest = rest[n:]
	}
	if length < 0 || length > len(rest) {
		return 0, nil, nil, errNotBER
	}
	return tag, rest[:length], rest[length:], nil
}

// untilEnd reads what is in an element whose length was left open, up to the two
// zeros that end it.
func untilEnd(tag byte, b []byte, depth int) (body, rest []byte, err error) {
	if tag&constructed == 0 {
		return nil, nil, errNotBER
	}
	rest = b
	for !bytes.HasPrefix(rest, []byte{0, 0}) {
		if _, _, rest, err = element(rest, depth+1); err != nil {
			return nil, nil, err
		}
	}
	return b[:len(b)-len(rest)], rest[2:], nil
}

// asSet is a SET with what is in it, in DER: so attributes are signed (RFC 5652
// §5.4), though the message tags them otherwise.
func asSet(body []byte) []byte {
	n := len(body)
	switch {
	case n < 1<<7:
		return append([]byte{berSet, byte(n)}, body...)
	case n < 1<<8:
		return append([]byte{berSet, 0x81, byte(n)}, body...)
	case n < 1<<16:
		return append([]byte{berSet, 0x82, byte(n >> 8), byte(n)}, body...)
	default:
		return append([]byte{berSet, 0x83, byte(n >> 16), byte(n >> 8), byte(n)}, body...)
	}
}
