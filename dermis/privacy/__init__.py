"""The privacy audit: what generated images, and their generator, disclose about the training images.

An auditor has the members (training images), the non-members (real images of other patients, separated at random before the
training) and generated images. Everything here works on arrays: features [N, dim] of images, or scores [N] of attacks.

    attacks            membership inference from generated images, and how the success of attacks is measured
    generator_attacks  membership inference from the generator itself
    controls           what members and non-members reveal without any generator
    disclosure         members with a near generated image, against non-members with one
    shares             intervals of the difference of two shares
    epsilon            lower bounds on the epsilon of differential privacy
    power              what the audit could have detected
    questions          singling out, linkability, inference
    verdict            the rules and their outcomes
    audit              the whole audit and its result
    report             the result as a text
"""
